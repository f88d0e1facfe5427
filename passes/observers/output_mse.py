"""The range of least squared error in the products that an activation goes into."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx

from qcompile.passes.affine import Array, range_qparams
from qcompile.passes.observers.counting import Counts
from qcompile.passes.observers.distribution import Distribution, Numbers
from qcompile.passes.observers.grids import squared_error
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.search import search
from qcompile.passes.spec import ActivationSpec

# What the mean channel counts for, and the most that one counts for: int32 sums must hold a batch.
_MEAN, _MOST = 64, 1 << 14
# How often the error of what is cut off counts. Large numbers are rare and mean more than their square: with 1, those
# that MiniLM has once a window were cut off and cost 0.03 of cosine; from 3 to 128 made no difference.
_CUT = 16.0


class OutputMse(Mse):
    """`mse` with the error of each channel weighted by what the products do with it: Σ_n W[k, n]².

    Errors of the channels are taken to be independent. With equal importance, or none given, it is `mse`.
    """

    name: ClassVar[str] = "output-mse"

    def __init__(
        self, value: str, *, axis: int | None = None, importance: Callable[[], Array | None] | None = None
    ) -> None:
        super().__init__(value, axis=axis)
        self.importance = importance

    def append(self, graph: onnx.GraphProto) -> None:
        """As `Histogram`; the importance is asked for now, when passes before have changed the weights."""
        found = self.importance() if self.importance is not None else None
        self.weights = None if found is None else counted(found)
        super().append(graph)

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """As `mse`, with what is cut off counted `_CUT` times."""

        def least(own: Distribution) -> tuple[float, float]:
            def loss(low: Array, high: Array) -> Numbers:
                whole = squared_error(own, low, high, spec)
                rounding = range_qparams(low, high, spec).scale.astype(np.float64) ** 2 / 12
                return whole + (_CUT - 1) * np.maximum(whole - rounding, 0)

            return search(loss, own.edges[0], own.edges[-1], spec)

        return self.per_channel([least(own) for own in self.distributions()])


def counted(importance: Array) -> Counts:
    """Integer weights of the same shape, in proportion to importance as far as they reach; at least 1 each."""
    mean = float(importance.mean())
    if not mean > 0:
        return np.ones(importance.shape, np.int64)
    weights: Counts = np.clip(np.rint(importance / mean * _MEAN), 1, _MOST).astype(np.int64)
    return weights
