"""passes/statistics.py: following rewrites."""

from dataclasses import replace

import numpy as np
import pytest
from observing import UINT8, observe

from qcompile.passes.observers.gram import Gram
from qcompile.passes.rotation import Rotation
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


@pytest.mark.parametrize("asked_before", [False, True])
def test_what_is_kept_of_a_gram_matrix_follows_a_factor_into_the_copy_alone(asked_before: bool) -> None:
    """The factor of G / (s sᵀ) is that of G with rows over s, in the order of before; the original keeps its own."""
    factor, own = np.exp(_w()[:, 0]), replace(_of(_x()), kept={})
    wanted = _of(_x()).compensation(0.01)
    if asked_before:
        own.compensation(0.01)
    found = own.rescaled(factor).compensation(0.01)
    np.testing.assert_array_equal(own.compensation(0.01).lower, wanted.lower)
    np.testing.assert_array_equal(own.compensation(0.01).scale, 1)
    if asked_before:
        np.testing.assert_array_equal(found.order, wanted.order)
        assert found.lower is own.compensation(0.01).lower, "nothing is copied"
    gram = _of(_x() / factor).gram.astype(np.float64)
    lower, back = found.scale * np.tril(found.lower).astype(np.float64), np.argsort(found.order)
    seen = (lower @ lower.T)[back][:, back]
    apart = ~np.eye(K, dtype=bool)  # the diagonal is damped
    np.testing.assert_allclose(seen[apart], gram[apart], rtol=1e-3, atol=1e-4 * np.abs(gram).max())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_copy_that_follows_a_factor_has_the_statistics_of_such_a_rewrite(sign: int) -> None:
    """Its products too, with its Gram matrix made or not."""
    factor, own = sign * np.exp(_w()[:, 0]), _of(_x())
    own.sample, own.rest = _x()[:9], np.abs(_x()).max(axis=0)
    copy, changed = own.rescaled(factor), replace(own)
    changed.rescale(factor)
    scale = np.abs(changed.gram).max()
    np.testing.assert_allclose(copy.times(_w()), changed.gram @ _w(), rtol=1e-4, atol=1e-5 * scale)
    for name in ("rows", "diagonal", "absmax", "sample", "rest", "mean_square", "energy", "reach", "gram"):
        np.testing.assert_allclose(getattr(copy, name), getattr(changed, name), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(copy.times(_w()), changed.gram @ _w(), rtol=1e-4, atol=1e-5 * scale)
    several = own.rescaled(np.stack([factor, np.ones_like(factor)], axis=1))  # each column has a factor of its own
    for name in ("diagonal", "energy", "absmax"):
        wanted = np.stack([getattr(copy, name), getattr(own, name)], axis=1)
        np.testing.assert_allclose(getattr(several, name), wanted, rtol=1e-5, err_msg=name)
    wanted = np.stack([changed.gram @ _w()[:, 0], own.gram @ _w()[:, 1]], axis=1)
    np.testing.assert_allclose(several.times(_w()[:, :2]), wanted, rtol=1e-4, atol=1e-5 * scale)
    copy.rescale(1 / factor)
    np.testing.assert_allclose(copy.gram, own.gram, rtol=1e-4)


def _sampled(x: np.ndarray) -> Statistics:
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), x, np.zeros(x.shape[1], np.float32))


def _same(found: Statistics, wanted: Statistics) -> None:
    np.testing.assert_allclose(found.gram, wanted.gram, rtol=1e-4, atol=1e-5 * np.abs(wanted.gram).max())
    np.testing.assert_allclose(found.absmax, wanted.absmax, rtol=1e-4)
    assert (found.rows, found.rotation is None) == (wanted.rows, wanted.rotation is None)


def test_the_parts_of_a_split_follow_rewrites_with_their_factor() -> None:
    """A pass that fits to them behind a rewrite finds what a split of the rewritten rows would have, and the Gram
    matrix is not factored again.
    """
    factor = np.random.default_rng(2).uniform(0.3, 3, K).astype(np.float32)
    statistics, wanted = _sampled(_x()), _sampled(_x() / factor)
    parts = statistics.split()
    assert parts is not None
    assert parts is statistics.split()
    before = parts[0].compensation(0.01)
    statistics.rescale(factor)
    rest, held = statistics.split() or pytest.fail("it can be split")
    other, rows = wanted.split() or pytest.fail("it can be split")
    _same(rest, other)
    np.testing.assert_allclose(held, rows, rtol=1e-5)
    followed = rest.compensation(0.01)
    assert followed.lower is before.lower
    assert followed.gram is rest.gram
    e = np.random.default_rng(3).standard_normal((K, 4)).astype(np.float32)
    damped = followed.damped[0] + np.diag(followed.damped[1])
    squares = np.square(followed.transposed_times(e[followed.order])).sum(axis=0)
    np.testing.assert_allclose(squares, np.einsum("kn,kn->n", e, damped @ e), rtol=1e-3)
    statistics.forget()
    assert statistics.split() is not parts


def test_a_rotation_turns_the_parts_of_a_split() -> None:
    """Those who judged it and those who round behind it fit to the same rows, by one factor."""
    x = np.random.default_rng(0).standard_normal((ROWS, 32)).astype(np.float32) * np.linspace(
        0.1, 4, 32, dtype=np.float32
    )
    statistics, rotation = _sampled(x), Rotation.of(32, 0)
    assert rotation is not None
    judged, rows = statistics.turned(rotation) or pytest.fail("it can be split")
    factor = judged.compensation(0.01)
    turned = statistics.rotated(Rotation.of(32, 0))
    _same(turned, replace(_sampled(rotation.turned(x)), rotation=rotation))
    rest, held = turned.split() or pytest.fail("it can be split")
    assert rest.compensation(0.01) is factor
    assert held is rows
    _same(rest, replace(_sampled(rotation.turned(x)), rotation=rotation).split()[0])
    other = statistics.turned(Rotation.of(32, 1))
    assert other is not None
    assert other[0] is not judged, "another rotation has parts of its own"
