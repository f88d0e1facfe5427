"""passes/rounding.py: the exact error of a rounding, and clipping that never loses by it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes import rounding
from qcompile.passes.affine import Grid, QParams, Quantized, output_error
from qcompile.passes.formats import named
from qcompile.passes.gptq import ErrorCompensated
from qcompile.passes.rounding import (
    better_columns,
    chunks,
    column_errors,
    fitted,
    relative_error,
    round_to_nearest,
    round_with_clip,
)
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import limited

K, N, ROWS = 96, 24, 300
SPECS = {"sym": QuantSpec(4, PerGroup(32), symmetric=True), "asym": QuantSpec(4, PerGroup(40))}


def _data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, Statistics]:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((ROWS, K)) @ rng.standard_normal((K, K)) * rng.lognormal(0, 1, K)).astype(np.float32)
    w = rng.standard_t(4, (K, N)).astype(np.float32)
    return x, w, Statistics(ROWS, x.T @ x, np.abs(x).max(axis=0))


def _output_errors(q: Quantized, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.square(x.astype(np.float64) @ (q.dequantize().astype(np.float64) - w)).sum(axis=0)


def test_gram_errors_are_output_errors() -> None:
    x, w, statistics = _data()
    q = round_to_nearest(w, SPECS["asym"], None)
    delta, wanted = q.dequantize() - w, _output_errors(q, x, w)
    np.testing.assert_allclose(column_errors(delta, statistics.gram), wanted, rtol=1e-3)
    assert output_error(delta, statistics.gram) == pytest.approx(wanted.sum(), rel=1e-3)
    scale = np.square(x.astype(np.float64) @ w).sum()
    assert relative_error(delta, w, statistics.gram) == pytest.approx(np.sqrt(wanted.sum() / scale), rel=1e-3)


def test_relative_error_of_nothing_is_zero() -> None:
    zeros = np.zeros((K, N), np.float32)
    assert relative_error(zeros, zeros, np.eye(K, dtype=np.float32)) == 0.0
    assert relative_error(zeros + 1, zeros + 1, np.zeros((K, K), np.float32)) == 0.0


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_clipping_loses_in_no_column_and_wins_overall(name, seed) -> None:
    x, w, statistics = _data(seed)
    plain = _output_errors(round_to_nearest(w, SPECS[name], statistics), x, w)
    clipped = _output_errors(round_with_clip(w, SPECS[name], statistics), x, w)
    assert (clipped <= plain * (1 + 1e-4)).all()
    assert clipped.sum() < 0.97 * plain.sum()


def test_clipping_without_statistics_is_plain_rounding() -> None:
    _, w, _ = _data()
    a, b = round_with_clip(w, SPECS["asym"], None), round_to_nearest(w, SPECS["asym"], None)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.qparams.scale, b.qparams.scale)


def test_better_columns_takes_each_column_whole() -> None:
    """Codes, scales and zero points of a column come from one candidate; ties stay with the first."""
    spec = QuantSpec(4, PerGroup(2))
    w = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1]], np.float32)
    ones, zeros = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    a = Quantized(np.array([[1, 2, 1]] * 3, np.uint8), QParams(ones, zeros), spec)
    b = Quantized(np.array([[4, 3, 3]] * 3, np.uint8), QParams(ones, zeros + 2), spec)
    best = better_columns(a, b, w, Statistics(1, np.eye(3, dtype=np.float32), np.ones(3, np.float32)))
    np.testing.assert_array_equal(best.codes, [[1, 3, 1]] * 3)
    np.testing.assert_array_equal(best.qparams.zero_point, [[0, 2, 0]] * 2)
    np.testing.assert_array_equal(best.dequantize(), w)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40000), st.integers(0, 300000))
def test_chunks_are_all_columns_once(k: int, n: int) -> None:
    """In order, of bounded size, and the same whatever the machine."""
    parts = chunks(k, n)
    assert [own.start for own in parts] == [0, *(own.stop for own in parts[:-1])]
    assert parts[-1].stop == n
    assert all(own.stop - own.start <= 1024 for own in parts)
    assert all((own.stop - own.start) * k <= max(1 << 23, 64 * k) for own in parts)


def test_memory_does_not_grow_with_columns_but_by_codes() -> None:
    """Error-compensated rounding of a float16 weight that is twice as wide takes its codes and scales more."""
    rng, peaks = np.random.default_rng(0), []
    x = (rng.standard_normal((512, 128)) @ rng.standard_normal((128, 128))).astype(np.float32)
    known = Statistics(512, x.T @ x, np.abs(x).max(axis=0), x, np.zeros(128, np.float32))
    spec = QuantSpec(4, PerGroup(32))
    for n in (4096, 8192):
        w = rng.standard_normal((128, n)).astype(np.float16)
        tracemalloc.start()
        with limited(1):
            assert fitted(w, spec, known, ErrorCompensated(), [round_to_nearest]) is not None
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    codes = 4096 * (128 + 2 * 4 * 4)
    assert peaks[1] - peaks[0] < 3 * codes, "those of chunks, and of the whole"


@settings(deadline=None, max_examples=80)
@given(
    k=st.integers(0, 70),
    n=st.integers(0, 150),
    group=st.sampled_from([0, 8, 16, 24, 64]),
    word=st.sampled_from(["int4", "int4 symmetric", "int8", "int3", "nf4", "mxfp4", "nvfp4"]),
    dtype=st.sampled_from([np.float32, np.float16]),
    turned=st.booleans(),
    block=st.sampled_from([1, 100, 1 << 10, 1 << 19]),
    widest=st.sampled_from([64, 1024]),
)
def test_blocks_round_as_the_whole_weight_does(k, n, group, word, dtype, turned, block, widest) -> None:
    """Bit by bit, with `fit` and `project` of all of it: in any type, either way round, by any number of threads."""
    rng = np.random.default_rng(k * 1000 + n)
    w = rng.standard_t(3, (n, k) if turned else (k, n)).astype(dtype)
    w = w.T if turned else w
    spec = _grid(word, group)
    wide = np.ascontiguousarray(w, np.float32)
    if not wide.size:
        assert round_to_nearest(w, spec, None).codes.shape == (k, n)
        return
    wanted = spec.fit(wide)
    with pytest.MonkeyPatch.context() as patch, limited(2):
        patch.setattr(rounding, "_BLOCK", block)
        patch.setattr(rounding, "_WIDEST", widest)
        found = round_to_nearest(w, spec, None)
    np.testing.assert_array_equal(found.qparams.scale, wanted.scale)
    np.testing.assert_array_equal(found.qparams.zero_point, wanted.zero_point)
    np.testing.assert_array_equal(found.codes, spec.project(wide, wanted))
    assert found.codes.dtype == spec.code_dtype


def _grid(word: str, group: int) -> Grid:
    kind, _, how = word.partition(" ")
    if kind.startswith("int"):
        return QuantSpec(int(kind[3:]), PerGroup(group) if group else PerChannel(1), symmetric=bool(how))
    return named(kind).grid("qcompile")
