"""passes/statistics.py: following rewrites."""

import numpy as np
from observing import UINT8, observe

from qcompile.passes.observers.gram import Gram
from qcompile.passes.statistics import Statistics

ROWS, K, N = 200, 12, 5


def _x(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, K)) @ rng.standard_normal((K, K))).astype(np.float32)


def _of(x: np.ndarray) -> Statistics:
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))


def _w(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)


def test_mean_square_is_per_channel() -> None:
    np.testing.assert_allclose(_of(_x()).mean_square, np.square(_x().astype(np.float64)).mean(axis=0), rtol=1e-5)
    assert not Statistics(0, np.zeros((K, K), np.float32), np.zeros(K, np.float32)).mean_square.any()


def test_rescale_is_collecting_again() -> None:
    factor = np.exp(_w()[:, 0]) * np.where(np.arange(K) % 2, 1, -1).astype(np.float32)
    found, wanted = _of(_x()), _of(_x() / factor)
    found.rescale(factor)
    np.testing.assert_allclose(found.gram, wanted.gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.absmax, wanted.absmax, rtol=1e-6)


def test_ranges_of_a_gram_are_of_each_index_on_its_axis() -> None:
    batches = [np.random.default_rng(seed).standard_normal((2, 3, K)) for seed in range(3)]
    own = observe(Gram("x"), batches)
    axis = range(3)[own.axis]
    peaks = np.abs(np.concatenate(batches)).max(axis=tuple(i for i in range(3) if i != axis))
    low, high = own.range(UINT8)
    np.testing.assert_allclose(high, peaks, rtol=1e-6)
    np.testing.assert_array_equal(low, -high)
