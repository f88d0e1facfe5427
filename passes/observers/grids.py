"""The numbers that codes stand for, in units of the scale, and the squared distance to the nearest of them."""

from functools import cache

import ml_dtypes
import numpy as np

from qcompile.passes.affine import Array, QParams, range_qparams
from qcompile.passes.observers.distribution import Distribution, Numbers
from qcompile.passes.spec import ActivationSpec


@cache
def float8_grid() -> Numbers:
    """The 253 finite numbers of float8 e4m3fn, rising, zero once."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


def squared_error(distribution: Distribution, low: Array, high: Array, spec: ActivationSpec) -> Numbers:
    """E (x - Q(x))² for the grids that span low … high, both (candidates,); exact for numbers spread evenly in bins."""
    qparams, edges = range_qparams(low, high, spec), distribution.edges
    scale = qparams.scale[:, None].astype(np.float64)
    # A bin without width, a constant's, gets 10^-6 of its place: the quotient below is then the distance there.
    right = np.maximum(edges[1:], edges[:-1] + 1e-6 * np.abs(edges[:-1]))
    left_integral = squared_distance(edges[:-1] / scale, qparams, spec)
    right_integral = squared_distance(right / scale, qparams, spec)
    width = np.maximum(right - edges[:-1], np.finfo(np.float64).tiny) / scale
    mean = (right_integral - left_integral) / width
    return np.asarray((mean @ distribution.counts) * scale[:, 0] ** 2 / distribution.total)


def squared_distance(points: Numbers, qparams: QParams, spec: ActivationSpec) -> Numbers:
    """∫₀ᵘ (v - Q(v))² dv at every point u = x / scale, Q the nearest code's number less zero point.

    points: (candidates, n), qparams of shape (candidates,). Beyond the ends of the grid, Q is the end.
    """
    return _float8_integral(points) if spec.is_float else _integer_integral(points, qparams, spec)


def _integer_integral(points: Numbers, qparams: QParams, spec: ActivationSpec) -> Numbers:
    """Every whole step has ∫ v² over ±1/2 = 1/12; what is left is a part of a cube around the nearest code."""
    zero_point = qparams.zero_point[:, None].astype(np.float64)
    nearest = np.clip(np.rint(points), spec.qmin - zero_point, spec.qmax - zero_point)
    rest = points - nearest
    return np.asarray(nearest / 12 + rest * rest * rest / 3)


def _float8_integral(points: Numbers) -> Numbers:
    """Between two neighbours that are d apart the integral grows by d³ / 12."""
    grid = float8_grid()
    upto = np.concatenate([np.zeros(1), np.cumsum(np.diff(grid) ** 3 / 12)])
    upto -= upto[len(grid) // 2]
    index = np.searchsorted((grid[1:] + grid[:-1]) / 2, points)
    rest = points - grid[index]
    return np.asarray(upto[index] + rest * rest * rest / 3)
