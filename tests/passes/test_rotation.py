"""passes/rotation.py: orthogonal, and statistics that follow it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.passes.affine import Array
from qcompile.passes.algebra import damping_of
from qcompile.passes.rotation import LEAST, MOST, Rotation, _symmetric, hadamard
from qcompile.passes.statistics import Statistics


def _of(channels: int, seed: int = 0) -> Rotation:
    made = Rotation.of(channels, seed)
    assert made is not None
    return made


def _rows(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loud = np.where(rng.random(channels) < 0.05, 30, 1)
    return (rng.standard_normal((rows, channels)) * loud).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_hadamard_is_orthogonal(size: int) -> None:
    assert set(np.unique(hadamard(size))) <= {-1, 1}
    np.testing.assert_array_equal(hadamard(size) @ hadamard(size).T, size * np.eye(size))


@given(st.integers(1, 5000))
def test_blocks_are_the_largest_that_divide(channels: int) -> None:
    made, fitting = Rotation.of(channels, 0), [size for size in (16, 32, 64) if channels % size == 0]
    assert (made is None) == (not fitting)
    assert made is None or LEAST <= len(made.signs) == max(fitting) <= MOST


@given(st.sampled_from([16, 48, 64, 96, 192]), st.integers(1, 40), st.integers(0, 9))
def test_products_stay(channels: int, columns: int, seed: int) -> None:
    own, rng = _of(channels, seed), np.random.default_rng(seed)
    x, w = _rows(7, channels, seed), rng.standard_normal((channels, columns)).astype(np.float32)
    scale = float(np.abs(x).max() * np.abs(w).max() * channels)
    np.testing.assert_allclose(own.turned(x) @ own.rows(w), x @ w, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(own.back(own.turned(x)), x, rtol=0, atol=1e-5 * np.abs(x).max())
    np.testing.assert_allclose(own.rows_before(own.rows(w)), w, rtol=0, atol=1e-5 * np.abs(w).max())
    np.testing.assert_allclose(np.linalg.norm(own.turned(x), axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


@given(st.sampled_from([16, 48, 64, 192]), st.integers(0, 99), st.floats(0, 9))
def test_no_turned_row_is_beyond_the_reach_of_its_block(channels: int, seed: int, tail: float) -> None:
    own, x = _of(channels, seed), _rows(9, channels, seed)
    x = np.asarray(np.sign(x) * np.abs(x) ** np.float32(1 + tail), np.float32)
    reach, block = own.reach(np.abs(x).max(axis=0)), len(own.signs)
    assert (np.abs(own.turned(x)).max(axis=0).reshape(-1, block) <= 1.0001 * reach[:, None]).all()
    same = own.reach(np.ones(channels, np.float32))  # and a row along the signs gets there
    assert np.abs(own.turned(np.tile(own.signs, channels // block))).max() == pytest.approx(same.max())


def test_signs_follow_the_seed() -> None:
    assert set(_of(64).signs) == {-1, 1}
    assert not np.array_equal(_of(64, 0).signs, _of(64, 1).signs)


def test_rotated_statistics_are_those_of_rotated_rows() -> None:
    x, own = _rows(300, 128), _of(128)
    known = Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), x, np.zeros(128, np.float32), np.arange(300) // 100)
    found, turned = known.rotated(own), own.turned(x)
    np.testing.assert_allclose(found.gram, turned.T @ turned, rtol=0, atol=1e-4 * np.abs(known.gram).max())
    np.testing.assert_array_equal(found.gram, found.gram.T)
    np.testing.assert_allclose(found.absmax, np.abs(turned).max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(own.gram_before(found.gram), known.gram, rtol=0, atol=1e-4 * np.abs(known.gram).max())
    np.testing.assert_allclose(own.diagonal_before(found.gram), np.diagonal(known.gram), rtol=1e-3)
    parts, before = found.split(), known.split()
    assert parts is not None
    assert before is not None
    np.testing.assert_allclose(parts[1], own.turned(before[1]), rtol=0, atol=1e-6 * np.abs(turned).max())
    assert parts[0].rotation is own
    assert found.held_groups is not None


def _damped(known: Statistics) -> Array:
    gram, added = known.compensation(0.5).damped
    return np.asarray(gram + np.diag(added))


def test_damping_is_that_of_the_channels_before() -> None:
    """A channel that is loud by itself is damped by itself: the others of its block are not drowned."""
    x, own = _rows(300, 64), _of(64)
    known = Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))
    found, wanted, turned = _damped(known.rotated(own)), _damped(known), known.rotated(own).gram
    np.testing.assert_allclose(own.gram_before(found), wanted, rtol=0, atol=1e-5 * np.abs(known.gram).max())
    behind = turned + np.diag(damping_of(np.diagonal(turned), 0.5))
    quiet = int(np.argmin(np.diagonal(known.gram)))
    added = own.gram_before(behind)[quiet, quiet] / known.gram[quiet, quiet] - 1
    assert added > 5  # what damping behind the rotation makes of the quietest channel


def test_factors_on_turned_channels_end_what_is_known_of_them() -> None:
    x = _rows(50, 64)
    found = Statistics(50, x.T @ x, np.abs(x).max(axis=0)).rotated(_of(64))
    found.rescale(np.full(64, 2, np.float32))
    assert found.rotation is None


@pytest.mark.parametrize("k", [1, 511, 512, 513, 1200])
def test_a_matrix_is_made_symmetric_in_its_place(k: int) -> None:
    matrix = np.random.default_rng(k).standard_normal((k, k), np.float32)
    wanted = (matrix + matrix.T) / 2
    assert _symmetric(matrix) is matrix
    np.testing.assert_array_equal(matrix, wanted)
