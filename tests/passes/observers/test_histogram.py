"""passes/observers/histogram.py: what is counted, how counts are merged, and what can be read from them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import GRIDS, KNOWN, UINT8, observe

from qcompile.passes.observers.counting import CHANNEL, TENSOR, Bins
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.observers.mse import Mse

SMALL = Bins(2, 4)


def _wide(shape: tuple[int, ...], seed: int, octaves: int = 20) -> np.ndarray:
    """Numbers of both signs, zeros among them, whose magnitudes span many octaves."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(-1, 2, shape)
    return (signs * 2.0 ** rng.uniform(-octaves, octaves, shape)).astype(np.float32)


def _expected(numbers: np.ndarray, bins: Bins, top: int) -> np.ndarray:
    """Counts (2, 1 + size) by numpy's own histogram."""
    edges = np.exp2(top - bins.octaves + np.arange(bins.size + 1) / bins.per_octave)
    counts = [np.histogram(side[side >= edges[0]], edges)[0] for side in (numbers, -numbers)]
    below = [(numbers >= 0) & (numbers < edges[0]), (numbers < 0) & (numbers > -edges[0])]
    return np.array([[rest.sum(), *own] for rest, own in zip(below, counts, strict=True)])


@pytest.mark.parametrize("octaves", [1, 20, 60])
def test_counts_are_numpy_s(octaves) -> None:
    """But for numbers at an edge, which may fall on its other side."""
    numbers = _wide((3000,), 0, octaves).astype(np.float64)
    own = observe(Mse("x"), [numbers])
    assert own.counts.shape == (1, 2, 1 + TENSOR.size)
    assert own.top[0] == np.floor(np.log2(np.abs(numbers).max())) + 1
    moved = np.abs(own.counts[0] - _expected(numbers.astype(np.float32), TENSOR, own.top[0])).sum()
    assert moved <= 2 * 3
    assert own.counts.sum() == 3000


def test_counts_beyond_float32_s_whole_numbers() -> None:
    """2^24 + 1 equal numbers: their count is no float32."""
    own = observe(Mse("x"), [np.ones((1 << 24) + 1, np.float32)])
    assert own.counts.sum() == own.counts.max() == (1 << 24) + 1


def test_one_batch_or_many_in_any_order() -> None:
    numbers = np.concatenate([_wide((500,), seed, octaves) for seed, octaves in enumerate((2, 9, 25, 40))])
    whole = observe(Mse("x"), [numbers])
    parts = np.array_split(numbers, 7)
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        own = observe(Mse("x"), order)
        assert own.counts.dtype == np.int64
        np.testing.assert_array_equal(own.counts, whole.counts)
        assert (own.top, own.low, own.high) == (whole.top, whole.low, whole.high)
        assert all(own.range(grid) == whole.range(grid) for grid in GRIDS)


@pytest.mark.parametrize(("shape", "axis"), [((6, 40, 5), -1), ((3, 5, 4, 4), 1), ((4, 90), 0), ((3, 5, 8), -2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_channel_is_as_if_it_were_alone(dtype, shape, axis) -> None:
    batches = [_wide(shape, seed, 5).astype(dtype) for seed in range(3)]
    own = observe(Mse("x", axis=axis), batches, dtype)
    low, high = own.range(UINT8)
    assert own.counts.shape == (shape[axis], 2, 1 + CHANNEL.size)
    for channel in range(shape[axis]):
        alone = Mse("x")
        alone.bins = CHANNEL
        observe(alone, [np.take(batch, channel, axis) for batch in batches], dtype)
        np.testing.assert_array_equal(alone.counts[0], own.counts[channel])
        assert alone.range(UINT8) == (low[channel], high[channel])
        assert (alone.low, alone.high) == (own.low[channel], own.high[channel])


def _counts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    cells = st.integers(0, 1 << 40)
    counts = draw(st.lists(cells, min_size=2 * (1 + SMALL.size), max_size=2 * (1 + SMALL.size)))
    return np.array(counts, np.int64).reshape(1, 2, -1), np.array([draw(st.integers(-20, 20))], np.int64)


_PARTS = st.lists(st.composite(_counts)(), min_size=1, max_size=5)


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> Histogram:
    own = Mse("x")
    own.bins = SMALL
    for counts, top in parts:
        own.merge(counts, top)
    return own


@given(_PARTS, st.randoms())
@settings(max_examples=200, deadline=None)
def test_merging_loses_nothing_and_has_no_order(parts, random) -> None:
    given_counts = [counts.copy() for counts, _ in parts]
    own = _merged(parts)
    assert own.counts.sum() == sum(int(counts.sum()) for counts in given_counts)
    assert own.counts.shape == (1, 2, 1 + SMALL.size)
    shuffled = list(parts)
    random.shuffle(shuffled)
    np.testing.assert_array_equal(own.counts, _merged(shuffled).counts)
    assert own.top == _merged(shuffled).top == max(top for _, top in parts)
    assert all((own == before).all() for (own, _), before in zip(parts, given_counts, strict=True)), "not written to"


@given(_PARTS)
@settings(max_examples=100, deadline=None)
def test_restore_and_go_on(parts) -> None:
    first, whole = _merged(parts), _merged([*parts, *parts])
    first.low = first.high = np.float32(0)
    second = Mse("x")
    second.bins = SMALL
    second.restore(first.state())
    for counts, top in parts:
        second.merge(counts, top)
    np.testing.assert_array_equal(second.counts, whole.counts)


def test_the_size_does_not_depend_on_the_batches() -> None:
    few, many = (observe(Mse("x"), [_wide((50,), seed) for seed in range(n)]) for n in (1, 20))
    assert {k: v.nbytes for k, v in few.state().items()} == {k: v.nbytes for k, v in many.state().items()}


def test_the_extremes_bound_the_distribution() -> None:
    own = observe(Mse("x"), [np.array([-3.3, -1e-3, 0.0, 0.7, 5.1])])
    (seen,) = own.distributions()
    assert (seen.edges[0], seen.edges[-1]) == (np.float32(-3.3), np.float32(5.1))
    assert all(a <= b for a, b in pairwise(seen.edges))
    assert seen.total == 5
    assert seen.without_zero().total == 4


@pytest.mark.parametrize("axis", [None, -1])
def test_plot(axis) -> None:
    numbers = KNOWN["normal"].sample(9999).reshape(-1, 3)
    edges, counts = observe(Mse("x", axis=axis), [numbers]).plot()
    assert len(edges) == len(counts) + 1 <= 65
    assert (edges[0], edges[-1]) == (numbers.min(), numbers.max())
    assert sum(counts) == numbers.size
    assert all(isinstance(count, int) for count in counts)
    exact = np.histogram(numbers, edges)[0]
    np.testing.assert_allclose(counts, exact, atol=0.06 * exact.max())


def test_nothing_to_plot() -> None:
    assert Mse("x").plot() == ((), ())
    assert observe(Mse("x"), [np.full((3, 4), 2.0)]).plot() == ((), ())
