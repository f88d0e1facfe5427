"""The range of least squared error."""

from typing import ClassVar

import numpy as np

from qcompile.passes.affine import Array, range_qparams
from qcompile.passes.observers.distribution import Distribution, Numbers
from qcompile.passes.observers.grids import squared_distance
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.observers.search import search
from qcompile.passes.spec import ActivationSpec


class Mse(Histogram):
    """The range whose grid has the least expected squared error, rounding and clipping together."""

    name: ClassVar[str] = "mse"

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Both ends searched, down to 2^-12 of the extremes."""
        return self.per_channel([_least_error(own, spec) for own in self.distributions()])


def _least_error(distribution: Distribution, spec: ActivationSpec) -> tuple[float, float]:
    def loss(low: Array, high: Array) -> Numbers:
        return squared_error(distribution, low, high, spec)

    return search(loss, distribution.edges[0], distribution.edges[-1], spec)


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
