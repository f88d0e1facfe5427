"""passes/ranges.py: no group is worse than by its whole range, the paper's grid is found, and where the search is."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.recipe import parse_passes
from qcompile.models.tiny import tiny_mlp
from qcompile.passes import rounding
from qcompile.passes.affine import Grid, Quantized, grouped
from qcompile.passes.base import Region
from qcompile.passes.formats import named
from qcompile.passes.linears import find_linears
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.ranges import ByWeight, Ranges, half_quadratic
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.passes.state import weight_state

FITTED: list[Ranges] = ["search", "hqq", "best"]
GRIDS = [
    QuantSpec(2, PerGroup(16)),
    QuantSpec(3, PerGroup(20), symmetric=True),
    QuantSpec(4, PerGroup(16), symmetric=True, signed_scale=False),
    QuantSpec(4, PerChannel(axis=1), scale_dtype=np.float16),
    QuantSpec(6, PerGroup(24)),
    named("nf4").grid("qcompile", group=16),
    named("mxfp4").grid("qcompile"),
    named("nvfp4").grid("qcompile").ranged(lambda: 8.0),
    named("pairs2").grid("qcompile"),
    named("pairs4").grid("qcompile"),
]


def _errors(w: np.ndarray, q: Quantized) -> np.ndarray:
    """Σ |w| (ŵ - w)² of each group, (groups, N)."""
    delta = q.dequantize().astype(np.float64) - w
    return grouped(np.abs(w) * np.square(delta), q.spec, fill=0.0).sum(axis=1)


def _heavy(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (k, n)).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(
    k=st.integers(1, 70),
    n=st.integers(1, 4),
    own=st.sampled_from(FITTED),
    kind=st.sampled_from(["heavy", "zeros", "equal", "positive", "sparse", "outlier", "tiny"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_no_group_is_worse_than_to_nearest(grid: Grid, k: int, n: int, own: Ranges, kind: str, seed: int) -> None:
    w = _heavy(k, n, seed)
    w = {
        "heavy": w,
        "zeros": np.zeros_like(w),
        "equal": np.full_like(w, -2.5),
        "positive": np.abs(w),
        "sparse": np.where(np.abs(w) > 1.5, w, 0),
        "outlier": np.where(np.arange(k)[:, None] == k - 1, 7, w / 100),
        "tiny": w * np.float32(1e-6),
    }[kind].astype(np.float32)
    plain, found = (ByWeight(other)(w, grid, None) for other in ("nearest", own))
    assert np.isfinite(found.dequantize()).all()
    assert not grid.positive or (found.qparams.scale > 0).all()
    size = (np.abs(w) ** 3).sum()
    assert (_errors(w, found) <= _errors(w, plain) * (1 + 1e-4) + 1e-6 * size).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_each_gains_on_heavy_tails_and_the_best_is_the_better(bits: int) -> None:
    w, spec = _heavy(256, 64), QuantSpec(bits, PerGroup(64))
    plain, search, hqq, best = (_errors(w, ByWeight(own)(w, spec, None)) for own in ("nearest", *FITTED))
    assert search.sum() < 0.96 * plain.sum()
    assert hqq.sum() < 0.96 * plain.sum()
    assert best.sum() <= 1.001 * np.minimum(search, hqq).sum()


def test_half_quadratic_optimization_finds_the_grid_beside_an_outlier() -> None:
    """Numbers of a grid of 16 levels, and one number half a step beyond it: least squares would give some to it."""
    rng, spec = np.random.default_rng(0), QuantSpec(4, PerGroup(64))
    levels = rng.integers(-5, 11, (64, 8)).astype(np.float32)
    levels[:2] = np.array([[-5], [10]])
    levels[2] = 10.5
    blocks = (levels * np.float32(0.25))[None]
    whole = spec.span(blocks, np.float32(1))
    (found,) = half_quadratic(blocks, whole, spec)
    np.testing.assert_array_equal(found.zero_point, 5)
    np.testing.assert_allclose(found.scale, 0.25, rtol=2e-3)
    assert (np.abs(whole.scale - 0.25) > 4 * np.abs(found.scale - 0.25)).all()


@pytest.mark.parametrize("own", FITTED)
def test_blocks_worked_on_together_change_nothing(own: Ranges, monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = _heavy(100, 12), QuantSpec(3, PerGroup(16))
    wanted = ByWeight(own)(w, spec, None)
    monkeypatch.setattr(rounding, "_BLOCK", 1)
    found = ByWeight(own)(w, spec, None)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.qparams.scale, wanted.qparams.scale)
    np.testing.assert_array_equal(found.qparams.zero_point, wanted.qparams.zero_point)


@pytest.mark.parametrize("own", get_args(Ranges))
def test_fine_grids_are_rounded_to_nearest(own: Ranges) -> None:
    w, spec = _heavy(64, 8), QuantSpec(8, PerGroup(32))
    np.testing.assert_array_equal(ByWeight(own)(w, spec, None).codes, round_to_nearest(w, spec, None).codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers_of_few_bits_are_searched_others_when_told(grid: Grid) -> None:
    """But for pairs, which have their own fit."""
    w = _heavy(96, 8)
    auto, plain, search = (ByWeight(own)(w, grid, None).dequantize() for own in ("auto", "nearest", "search"))
    np.testing.assert_array_equal(auto, search if grid.bits < 4 else plain)
    assert np.array_equal(plain, search) == (grid.rows_per_code > 1)


@pytest.mark.parametrize("own", get_args(Ranges))
def test_pack_rounds_by_what_the_recipe_says(own: Ranges) -> None:
    (step,) = parse_passes(f"pack(ranges={own})")
    model, spec = tiny_mlp(), QuantSpec(4, PerGroup(16))
    linear = find_linears(model.graph)[0]
    wanted = ByWeight(own)(linear.read(), spec, None)
    weight = linear.weight
    Pack(Policy(spec, None, None), **step.parameters).call(Region(model, [linear.node]))
    ((found, _),) = weight_state(weight).packed.values()
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.qparams.scale, wanted.qparams.scale)
