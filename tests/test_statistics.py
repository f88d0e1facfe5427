"""passes/statistics.py: following rewrites, sums, and the weight that makes up for quantized inputs."""

import numpy as np
import pytest

from qcompile.passes.statistics import Statistics

ROWS, K, N = 200, 12, 5


def _x(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, K)) @ rng.standard_normal((K, K))).astype(np.float32)


def _of(x: np.ndarray, reference: np.ndarray | None = None) -> Statistics:
    cross = None if reference is None else x.T @ reference
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), cross)


def _w(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)


def test_mean_square_is_per_channel() -> None:
    np.testing.assert_allclose(_of(_x()).mean_square, np.square(_x().astype(np.float64)).mean(axis=0), rtol=1e-5)
    assert not Statistics(0, np.zeros((K, K), np.float32), np.zeros(K, np.float32)).mean_square.any()


@pytest.mark.parametrize("crossed", [False, True])
def test_rescale_is_collecting_again(crossed) -> None:
    factor = np.exp(_w()[:, 0]) * np.where(np.arange(K) % 2, 1, -1).astype(np.float32)
    reference = _x(2) if crossed else None
    found, wanted = _of(_x(), reference), _of(_x() / factor, reference / factor if crossed else None)
    found.rescale(factor)
    np.testing.assert_allclose(found.gram, wanted.gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.absmax, wanted.absmax, rtol=1e-6)
    if crossed:
        np.testing.assert_allclose(found.cross, wanted.cross, rtol=1e-4, atol=1e-3)
    else:
        assert found.cross is None


def test_add_is_collecting_both() -> None:
    a, b = _x(0, 50), 3 * _x(1, 70)
    found, wanted = _of(a, a + 1), _of(np.concatenate([a, b]), np.concatenate([a, b]) + 1)
    found.add(_of(b, b + 1))
    assert found.rows == 120
    for name in ("gram", "absmax", "cross"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-2)
    found.add(_of(a))
    assert found.cross is None, "a cross of half the rows says nothing"


def test_target_without_cross_is_the_weight_itself() -> None:
    w = _w()
    assert _of(_x()).target(w) is w


def test_target_of_unchanged_inputs_is_the_weight() -> None:
    x, w = _x(), _w()
    np.testing.assert_allclose(_of(x, x).target(w), w, rtol=0, atol=2e-5)


def test_target_is_the_least_squares_solution() -> None:
    """min ‖X w' - X₀ w‖² + Σ p_k (w'_k - w_k)², p a twentieth of each channel's energy, solved on the rows."""
    reference, w = _x(), _w()
    x = (reference + 0.3 * np.random.default_rng(3).standard_normal(reference.shape)).astype(np.float32)
    x64, reference64 = x.astype(np.float64), reference.astype(np.float64)
    energy = np.square(x64).sum(axis=0)
    pull = np.sqrt(0.05 * energy + 1e-6 * energy.mean())
    rows = np.concatenate([x64, np.diag(pull)])
    wanted = np.linalg.lstsq(rows, np.concatenate([reference64 @ w, pull[:, None] * w]), rcond=None)[0]
    found = _of(x, reference).target(w)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    before, after = (np.square(x64 @ candidate - reference64 @ w).sum() for candidate in (w, found))
    assert after < 0.9 * before


def test_target_survives_dead_channels_and_few_rows() -> None:
    x = _x(rows=4)
    x[:, 3] = 0
    w = _w()
    found = _of(x, x * np.float32(1.01)).target(w)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[3], w[3], atol=1e-3, err_msg="a dead channel keeps its weight")
    assert np.isfinite(Statistics(0, np.zeros((K, K)), np.zeros(K), np.zeros((K, K))).target(w)).all()
