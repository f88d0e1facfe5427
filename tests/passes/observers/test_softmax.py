"""passes/observers/cross_entropy.py: the range against brute force on a softmax of our own."""

import numpy as np
import pytest
from observing import FLOAT8, INT8_SYM, UINT8, UINT16, observe

from qcompile.passes.affine import range_qparams
from qcompile.passes.errors import UserError
from qcompile.passes.observers.cross_entropy import CrossEntropy
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.softmax import candidates
from qcompile.passes.spec import ActivationSpec

RNG = np.random.default_rng(0)
SCORES = 3 * RNG.standard_normal((4, 64, 64))
CASES = {
    "scores": SCORES,
    "sink": SCORES + np.where(np.arange(64) == 0, 20, 0),
    "far below": np.where(RNG.random(SCORES.shape) < 0.002, -600, SCORES),
    "logits": 2 * RNG.standard_normal((40, 1000)) - 5 + 15 * (RNG.random((40, 1000)) < 2e-3),
}


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _divergence(x: np.ndarray, low: float, high: float, grid: ActivationSpec) -> float:
    """Mean KL(softmax(x) ‖ softmax(Q(x))) over rows, in float64."""
    qparams = range_qparams(np.float32(low), np.float32(high), grid)
    scale, zero_point = float(qparams.scale), float(qparams.zero_point)
    moved = (np.clip(np.rint(x / scale) + zero_point, grid.qmin, grid.qmax) - zero_point) * scale
    p, q = _softmax(x), _softmax(moved)
    return float(np.mean(np.sum(p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), axis=-1)))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_divergences(case) -> None:
    """Of every fifth candidate, on rows that are all looked at."""
    x = CASES[case].reshape(-1, CASES[case].shape[-1])[:15].astype(np.float32)
    own = observe(CrossEntropy("x"), [x])
    assert own.rows == 15
    expected = [15 * _divergence(x.astype(np.float64), *ends, UINT8) for ends in candidates()[::5]]
    np.testing.assert_allclose(own.losses[::5], expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("grid", [UINT8, INT8_SYM], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_range_is_near_the_best_of_a_finer_search(case, grid) -> None:
    """At most 1.6 times the least divergence of 20 x 20 ranges, and never far above that of the whole range; candidates
    are half octaves, and rows a sample.
    """
    x = CASES[case].astype(np.float32).astype(np.float64)
    low, high = observe(CrossEntropy("x"), np.array_split(x, 2)).range(grid)
    clips = -x.min() * np.exp2(-np.arange(0, 10, 0.5)), x.max() * np.exp2(-np.arange(0, 3, 0.15))
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[:: max(1, len(rows) // 40)]
    own = _divergence(rows, low, high, grid)
    if grid.symmetric:
        best = min(_divergence(rows, -clip, clip, grid) for clip in np.concatenate(clips))
    else:
        best = min(_divergence(rows, -a, b, grid) for a in clips[0] for b in clips[1])
    assert own <= 1.6 * best + 1e-6
    assert own <= 1.1 * _divergence(rows, x.min(), x.max(), grid)


def test_what_softmax_ignores_gets_no_codes() -> None:
    """-600 among scores around 0: the squared error keeps it, and softmax pays for that."""
    x = CASES["far below"].astype(np.float32)
    by_softmax, by_error = observe(CrossEntropy("x"), [x]).range(UINT8), observe(Mse("x"), [x]).range(UINT8)
    assert by_softmax[0] > -16 > -300 > by_error[0]
    own, other = (_divergence(x.astype(np.float64), *ends, UINT8) for ends in (by_softmax, by_error))
    assert own < 0.02 * other


def test_masked_scores() -> None:
    """The least float32 number for what a query must not see: no NaN, and a range for the scores."""
    mask = np.where(np.tril(np.ones((64, 64))), 0, np.finfo(np.float32).min)
    low, high = observe(CrossEntropy("x"), [np.maximum(SCORES + mask, np.finfo(np.float32).min)]).range(UINT8)
    assert -32 < low < -4
    assert 6 < high <= SCORES.max()


def test_batches_add_up() -> None:
    first, second = SCORES[:1], SCORES[1:2]
    both, parts = (
        observe(CrossEntropy("x"), [first, second]),
        [observe(CrossEntropy("x"), [b]) for b in (first, second)],
    )
    np.testing.assert_allclose(both.losses, parts[0].losses + parts[1].losses, rtol=1e-12)
    assert both.rows == parts[0].rows + parts[1].rows


@pytest.mark.parametrize(("shape", "rows"), [((3, 64), 3), ((600, 64), 200), ((2, 300, 64), 200), ((9, 50_000), 3)])
def test_a_batch_is_sampled_evenly(shape, rows) -> None:
    """At most 16384 numbers or 4 rows, every n-th row with n odd: 600 / 256 → 3, 9 / 4 → 3."""
    assert observe(CrossEntropy("x"), [np.zeros(shape)]).rows == rows


def test_float16_scores() -> None:
    x = SCORES.astype(np.float16)
    half, full = observe(CrossEntropy("x"), [x], np.float16), observe(CrossEntropy("x"), [x.astype(np.float32)])
    np.testing.assert_allclose(half.losses, full.losses, rtol=1e-5)


def test_symmetric_grids_choose_among_symmetric_ranges() -> None:
    """Of the least loss, cut to what was seen."""
    own, ends = observe(CrossEntropy("x"), [np.array([[-300.0, 200.0]])]), candidates()
    symmetric = np.flatnonzero(-ends[:, 0] == ends[:, 1])
    best = int(np.argmax(-ends[:, 0] != ends[:, 1])), symmetric[len(symmetric) // 2]
    own.losses = np.full(len(ends), 9.0)
    own.losses[list(best)] = 1, 2
    for grid, chosen in zip((UINT8, INT8_SYM), best, strict=True):
        assert own.range(grid) == (max(-300, ends[chosen, 0]), min(200, ends[chosen, 1]))


def test_16_bits_keep_everything() -> None:
    own = observe(CrossEntropy("x", bits=16), [SCORES])
    low, high = own.range(UINT16)
    x = SCORES.astype(np.float32).astype(np.float64)
    assert _divergence(x, low, high, UINT16) < 1e-6


@pytest.mark.parametrize(("bits", "grid"), [(8, UINT16), (8, FLOAT8), (16, UINT8)], ids=str)
def test_a_grid_of_other_levels_is_refused(bits, grid) -> None:
    own = observe(CrossEntropy("x", bits=bits), [SCORES])
    with pytest.raises(UserError, match=f"x was observed for {bits}-bit integers, not {grid}"):
        own.range(grid)


def test_candidates_are_wide_to_narrow_and_symmetric_ones_finer() -> None:
    ends = candidates()
    assert (np.diff(ends[:, 1] - ends[:, 0]) <= 0).all()
    assert len(np.unique(ends, axis=0)) == len(ends)
    symmetric = ends[-ends[:, 0] == ends[:, 1], 1]
    np.testing.assert_allclose(symmetric[:-1] / symmetric[1:], 2 ** (1 / 8), rtol=1e-6)
