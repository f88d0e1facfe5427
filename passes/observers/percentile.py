"""The range that all but the rarest numbers of an activation lie in."""

from typing import ClassVar

from qcompile.passes.affine import Array
from qcompile.passes.errors import UserError
from qcompile.passes.observers.distribution import Distribution
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.spec import ActivationSpec


class Percentile(Histogram):
    """The range that `percentile` percent of the numbers lie in.

    Asymmetric grids: half of the others lie beyond each end. Symmetric grids: the percentile of the magnitudes
    (Wu et al. 2020, Integer Quantization for Deep Learning Inference, arXiv:2004.09602). The default cuts off one
    number in a million: decoders need their few huge ones (docs/extending.md has figures).
    """

    name: ClassVar[str] = "percentile"

    def __init__(self, value: str, *, axis: int | None = None, percentile: float = 99.9999) -> None:
        super().__init__(value, axis=axis)
        if not 50 < percentile <= 100:
            raise UserError(f"percentile: percentile must be above 50 and at most 100, got {percentile}")
        self.share = percentile / 100

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Two quantiles, or that of the magnitudes with both signs; zero included, within the extremes."""
        return self.per_channel([self._ends(own, spec) for own in self.distributions()])

    def _ends(self, distribution: Distribution, spec: ActivationSpec) -> tuple[float, float]:
        if spec.symmetric:
            most = distribution.magnitude(self.share)
            low, high = max(-most, distribution.edges[0]), min(most, distribution.edges[-1])
        else:
            beyond = (1 - self.share) / 2
            low, high = distribution.quantile(beyond), distribution.quantile(1 - beyond)
        return min(low, 0.0), max(high, 0.0)
