"""The range of least squared error."""

from typing import ClassVar

from qcompile.passes.affine import Array
from qcompile.passes.observers.distribution import Distribution, Numbers
from qcompile.passes.observers.grids import squared_error
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.observers.search import search
from qcompile.passes.spec import ActivationSpec


class Mse(Histogram):
    """The range whose grid has the least expected squared error, rounding and clipping together."""

    name: ClassVar[str] = "mse"

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Both ends searched, down to 2^-12 of the extremes."""
        return self.per_channel([_least_error(own, spec) for own in self.distributions()])

    def restrained(self, spec: ActivationSpec, low: Array, high: Array) -> float:
        """All the way: it has the least error."""
        return 1.0


def _least_error(distribution: Distribution, spec: ActivationSpec) -> tuple[float, float]:
    def loss(low: Array, high: Array) -> Numbers:
        return squared_error(distribution, low, high, spec)

    return search(loss, distribution.edges[0], distribution.edges[-1], spec)
