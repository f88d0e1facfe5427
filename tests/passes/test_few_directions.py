"""Rows that lie in few directions, as copies of one row do: counted, and followed by the rounding of `pack`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes.gptq import round_by_rows
from qcompile.passes.rounding import round_to_nearest, round_with_clip
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics

SPECS = {"sym": QuantSpec(4, PerGroup(32), symmetric=True), "asym": QuantSpec(4, PerGroup(128))}


def _statistics(x: np.ndarray) -> Statistics:
    x = np.ascontiguousarray(x, np.float32)
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), x, np.zeros(x.shape[1], np.float32))


def _loss(q, w: np.ndarray, x: np.ndarray) -> float:
    """The share of ‖x w‖² that rounding costs, in dB."""
    return 10 * np.log10(np.square(x @ (q.dequantize() - w)).sum() / np.square(x @ w).sum())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([1e-10, 1e-3, 1.0, 1e6]), st.integers(0, 9))
def test_directions_are_the_rank_up_to_a_bound(rank: int, k: int, size: float, seed: int) -> None:
    """Whatever the sizes of rows and of channels, dead channels among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, rank)) @ rng.standard_normal((rank, k)) * size * 10 ** rng.uniform(-2, 2, k)
    x[:, rng.random(k) < 0.2] = 0
    true = np.linalg.matrix_rank(x, tol=1e-6 * np.abs(x).max(initial=0))
    found = _statistics(x)
    assert found.directions(k) <= min(rank, k)
    assert found.directions(0) == min(true, 1)
    for most in range(k):
        assert found.directions(most) == min(found.directions(k), most + 1)


def test_directions_of_noise_are_its_channels() -> None:
    x = np.random.default_rng(0).standard_normal((64, 12)) + 3
    assert _statistics(x).directions(20) == 12
    assert _statistics(np.zeros((8, 4))).directions(4) == 0
    assert _statistics(3 + 1e-3 * x).directions(4) == 1, "noise of a thousandth is none"


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, max_examples=8)
@given(st.sampled_from([(32, 1), (96, 1), (128, 3), (256, 8)]), st.integers(0, 99), st.booleans())
def test_few_directions_are_kept_and_others_not_given_away(name: str, sizes: tuple[int, int], seed: int, one: bool):
    """Other rows of these directions have a tenth of the error and less, and rows of any other 3 dB more at most."""
    k, count = sizes
    rng = np.random.default_rng(seed)
    basis, w = rng.standard_normal((count, k)), rng.standard_normal((k, 24)).astype(np.float32)
    if one:
        basis[:] = rng.uniform(-4, 4, (count, 1)) * (1 + np.arange(count)[:, None] * (np.arange(k) % 2))
    x, unseen = rng.standard_normal((160, count)) @ basis, rng.standard_normal((32, count)) @ basis
    found, plain = (rounding(w, SPECS[name], _statistics(x)) for rounding in (round_by_rows, round_to_nearest))
    assert _loss(found, w, unseen) < _loss(plain, w, unseen) - 10
    other = rng.standard_normal((200, k))
    assert _loss(found, w, other) < _loss(plain, w, other) + 3


@pytest.mark.parametrize("rows", [1, 7, 24, 400])
def test_rows_of_many_directions_are_rounded_with_clip(rows: int) -> None:
    """So are too few rows to tell, rows of zeros, and what is known of no data at all."""
    rng = np.random.default_rng(rows)
    w, x = rng.standard_normal((48, 16)).astype(np.float32), rng.standard_normal((rows, 48))
    x[:, :4] += 30  # what dominates is not all
    for known in (_statistics(x), _statistics(0 * x), _statistics(np.repeat(x[:1], 7, axis=0)), None):
        found, clipped = (rounding(w, SPECS["sym"], known) for rounding in (round_by_rows, round_with_clip))
        np.testing.assert_array_equal(found.codes, clipped.codes)
        np.testing.assert_array_equal(found.qparams.scale, clipped.qparams.scale)
