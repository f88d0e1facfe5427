"""passes/algebra.py: Cholesky's factor by blocks, where float32 serves and where it does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from qcompile.passes import algebra
from qcompile.passes.algebra import Compensation, add_gram, cholesky, damping_of, mirror
from qcompile.passes.threads import limited


def _gram(k: int, rows: int, seed: int = 0) -> np.ndarray:
    """Of correlated channels of very different energy; singular where rows are fewer than channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) @ (np.eye(k) + rng.standard_normal((k, k)) / np.sqrt(k)) * rng.lognormal(0, 2, k)
    return (x.T @ x).astype(np.float32)


def _factor(own: Compensation) -> np.ndarray:
    return own.scale * np.tril(own.lower).astype(np.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 9), st.integers(2, 5))
def test_a_gram_matrix_is_summed_by_its_lower_triangle(k: int, rows: int, threads: int) -> None:
    """XᵀX, exactly symmetric; no bit depends on the number of threads; what is taken away again leaves rounding."""
    x = np.random.default_rng(k).standard_normal((rows, k), np.float32)
    made = []
    for count in (1, threads):
        with limited(count):
            made.append(np.zeros((k, k), np.float32))
            add_gram(made[-1], x)
    np.testing.assert_array_equal(*made)
    total = mirror(made[0].copy())
    np.testing.assert_array_equal(total, total.T)
    np.testing.assert_allclose(total, x.astype(np.float64).T @ x, rtol=0, atol=1e-5 * max(rows, 1))
    add_gram(total, x, -1)
    np.testing.assert_allclose(np.tril(total), 0, rtol=0, atol=1e-5 * max(rows, 1))


@settings(max_examples=6, deadline=None)
@given(st.integers(520, 700), st.integers(500, 900), st.integers(1, 3))
def test_blas_s_threads_change_no_bit_of_a_gram_matrix(k: int, rows: int, threads: int) -> None:
    """Of products that BLAS shares among its threads where it may: tiles beside the diagonal, of hundreds of rows."""
    x = np.random.default_rng(k).standard_normal((rows, k), np.float32)
    made = []
    for most in (1, 2, 4):
        with threadpool_limits(most, "blas"), limited(threads):
            made.append(np.zeros((k, k), np.float32))
            add_gram(made[-1], x)
    assert all(np.array_equal(made[0], own) for own in made)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(0, 9), st.sampled_from([np.float32, np.float64]))
def test_the_factor_is_lapack_s(k: int, seed: int, dtype: type) -> None:
    """Blocks of 128 columns, whatever is left of them; the triangle above stays."""
    matrix = (_gram(k, 2 * k + 8, seed) + np.diag(damping_of(np.ones(k, np.float32), 0.1))).astype(dtype)
    made = matrix.copy()
    cholesky(made)
    above = np.triu_indices(k, 128)
    np.testing.assert_array_equal(made[above], matrix[above])
    size = np.sqrt(np.diagonal(matrix).astype(np.float64))
    wanted = np.linalg.cholesky(matrix.astype(np.float64))
    limit = 1e-11 if dtype == np.float64 else 3e-4
    np.testing.assert_allclose(np.tril(made) / size[:, None], wanted / size[:, None], rtol=0, atol=limit)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(threads: int) -> None:
    one, several = _gram(1300, 3000), _gram(1300, 3000)
    with limited(1):
        cholesky(one)
    with limited(threads):
        cholesky(several)
    np.testing.assert_array_equal(one, several)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400), st.sampled_from([1e-4, 0.01, 1.0]), st.integers(0, 9))
def test_compensation_is_the_damped_matrix_in_order(k: int, rows: int, damping: float, seed: int) -> None:
    """Whatever channels are silent; the products by the factor are those by the triangle."""
    gram = _gram(k, rows, seed)
    gram[: k // 5], gram[:, : k // 5] = 0, 0
    added = damping_of(np.diagonal(gram), damping)
    by = (1 + np.arange(k) % 3).astype(np.float32)
    own = Compensation.of(gram, added).rescaled(by)
    wanted = (gram + np.diag(added)).astype(np.float64) / np.outer(by, by)
    size = np.sqrt(np.diagonal(wanted))
    lower, order = _factor(own), own.order
    correlations = (wanted / np.outer(size, size))[order][:, order]
    np.testing.assert_allclose(lower @ lower.T / np.outer(size, size)[order][:, order], correlations, atol=1e-5)
    energy = np.diagonal(gram) + added
    assert (np.diff(energy[order]) >= 0).all(), "those of most energy are rounded first, from the end"
    x = np.random.default_rng(seed).standard_normal((k, 3)).astype(np.float32)
    for found, exact in ((own.transposed_times(x), lower.T @ x), (own.times(x), lower @ x)):
        np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max(), rtol=1e-4)


def test_a_matrix_too_near_to_a_singular_one_is_factored_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of 200 channels without damping: float32 fails or is far off, and that is noticed."""
    seen: list[np.dtype] = []

    def noted(matrix: np.ndarray) -> None:
        seen.append(matrix.dtype)
        cholesky(matrix)

    monkeypatch.setattr(algebra, "cholesky", noted)
    gram = _gram(200, 4)
    Compensation.of(gram, damping_of(np.diagonal(gram), 0.01))
    assert seen == [np.float32]
    added = damping_of(np.diagonal(gram), 0.0)
    own = Compensation.of(gram, added)
    assert seen[:3] == [np.float32, np.float32, np.float64]
    lower, wanted = _factor(own), (gram + np.diag(added)).astype(np.float64)[own.order][:, own.order]
    size = np.sqrt(np.diagonal(wanted))
    error = (lower @ lower.T - wanted) / np.outer(size, size)
    assert np.isfinite(lower).all()
    assert np.abs(error).max() < 1e-3, "little is added"
    monkeypatch.setattr(algebra, "_RESIDUAL", 0.0)
    Compensation.of(gram, damping_of(np.diagonal(gram), 0.01))
    assert seen[-1] == np.float64, "an error of that size is noticed"
