"""The range whose codes say most about the distribution: the calibration of TensorRT, on a smooth histogram."""

from typing import ClassVar

import numpy as np

from qcompile.passes.affine import Array, QParams, range_qparams
from qcompile.passes.observers.distribution import Distribution, Numbers
from qcompile.passes.observers.grids import float8_grid
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.observers.search import search
from qcompile.passes.spec import ActivationSpec

# Parts of a cell (what one code stands for) in which numbers are told apart, and the codes on both sides of zero whose
# cells are taken apart: farther out, bins of 1/64 octave are wider than cells and show nothing inside them.
_PARTS, _NEAR = 8, 256


class Entropy(Histogram):
    """The range that loses least information, as a Kullback-Leibler divergence.

    By Migacz 2017, 8-bit Inference with TensorRT, GTC (there with equal bins and a symmetric range).
    P is the distribution of the numbers, those beyond the range counted at its ends; Q is that of the numbers within
    the range, spread evenly over those eighths of their code's cell that hold any. Exact zeros lose nothing on any
    grid. Meant for activations with long tails: what is rare is clipped, however large it is.
    """

    name: ClassVar[str] = "entropy"

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Both ends searched, down to 2^-12 of the extremes."""
        return self.per_channel([_least_divergent(own, spec) for own in self.distributions()])


def _least_divergent(distribution: Distribution, spec: ActivationSpec) -> tuple[float, float]:
    def loss(low: Array, high: Array) -> Numbers:
        return divergence(distribution, low, high, spec)

    return search(loss, distribution.edges[0], distribution.edges[-1], spec)


def divergence(distribution: Distribution, low: Array, high: Array, spec: ActivationSpec) -> Numbers:
    """KL(P‖Q) in nats, for the grids that span low … high, both (candidates,).

    By the chain rule it is that of the codes, plus that of the numbers within each cell.
    """
    qparams = range_qparams(low, high, spec)
    inner, ends = _borders(qparams, spec)
    return (_of_codes(distribution, ends) + _within(distribution.without_zero(), inner)) / distribution.total


def _of_codes(distribution: Distribution, ends: Numbers) -> Numbers:
    """Σ p ln(p / q) - p + q over the end codes: P has the numbers beyond the range there, Q has them nowhere.

    An end cell that holds nothing within the range counts as half a number, so that a lone outlier behind a gap costs
    little and not everything. Q is not scaled up to 1: a range that holds nothing would fit itself perfectly.
    ends: (candidates, 4), the borders of the first and of the last cell.
    """
    below = distribution.below(ends)
    held = np.stack([below[:, 1] - below[:, 0], below[:, 3] - below[:, 2]])
    p = held + np.stack([below[:, 0], distribution.total - below[:, 3]])
    q = np.where(p > held, np.maximum(held, 0.5), held)
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log(ratio) - p + q).sum(axis=0))


def _within(distribution: Distribution, borders: Numbers) -> Numbers:
    """Σ n ln(n / mean) over the parts of all cells with borders (candidates, cells + 1), the mean that of a cell's
    parts that hold anything: few numbers, or numbers with gaps, are no reason to clip.
    """
    steps = np.arange(_PARTS) / _PARTS
    starts = borders[:, :-1, None] + np.diff(borders)[:, :, None] * steps
    points = np.concatenate([starts.reshape(len(borders), -1), borders[:, -1:]], axis=1)
    parts = np.diff(distribution.below(points)).reshape(len(borders), -1, _PARTS)
    filled = (parts > 0).sum(axis=2, keepdims=True)
    ratio = np.divide(filled * parts, parts.sum(axis=2, keepdims=True), out=np.ones_like(parts), where=parts > 0)
    return np.asarray((parts * np.log(ratio)).sum(axis=(1, 2)))


def _borders(qparams: QParams, spec: ActivationSpec) -> tuple[Numbers, Numbers]:
    """Borders of the cells near zero (candidates, cells + 1), and of the first and last cell (candidates, 4)."""
    scale, zero_point = (own.astype(np.float64)[:, None] for own in (qparams.scale, qparams.zero_point))
    if spec.is_float:
        grid = float8_grid()
        inner = (grid[1:] + grid[:-1]) / 2
        last = 2 * grid[-1] - inner[-1]
        cells = np.concatenate([[-last], inner, [last]])
        return cells * scale, cells[[0, 1, -2, -1]] * scale
    first, final = spec.qmin - zero_point, spec.qmax - zero_point
    near = np.arange(-_NEAR, _NEAR + 1)
    cells = np.clip(near, first, final + 1) - 0.5
    return cells * scale, np.concatenate([first - 0.5, first + 0.5, final - 0.5, final + 0.5], axis=1) * scale
