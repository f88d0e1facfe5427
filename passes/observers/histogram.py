"""Histograms with logarithmic bins, counted inside ONNX Runtime: every magnitude is resolved alike."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Outputs, State
from qcompile.passes.observers.counting import CHANNEL, TENSOR, Counts, Octaves, append_counts
from qcompile.passes.observers.distribution import Distribution, from_bins
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.grids import squared_error
from qcompile.passes.observers.nodes import add_outputs, by_channel, has
from qcompile.passes.spec import ActivationSpec

# Bins of equal width that a report shows.
_PLOTTED = 64
# Ranges that are tried between the extremes and one that an observer would have.
_SHARES = 17


class Histogram(Extremes):
    """Counts of an activation's numbers by sign and magnitude, besides its exact extremes.

    counts: int64 (channels, 2, 1 + size), positive numbers first; one channel for the whole tensor. top: int64
    (channels,), the octave above the largest magnitude. A batch has the top of its own largest magnitude; a sum has the
    higher one of both, and since tops are whole octaves bins move without being split. So the sum does not depend on
    the order of the batches, and no number is lost. weights: what numbers count for, integers that broadcast to the
    shape of the value; 1 without.
    """

    def __init__(self, value: str, *, axis: int | None = None, weights: Counts | None = None) -> None:
        super().__init__(value, axis=axis)
        self.weights = weights
        self.bins = TENSOR if axis is None else CHANNEL
        self.counts: Counts | None = None
        self.top: Octaves | None = None

    def append(self, graph: onnx.GraphProto) -> None:
        """`prefix`.bins.counts, int32 (channels * 2 * (1 + size),), and `prefix`.bins.top, float32."""
        super().append(graph)
        counts, top = f"{self.prefix}.bins.counts", f"{self.prefix}.bins.top"
        if has(graph, counts):
            return
        source, channels = by_channel(graph, self.value, self.axis), self.axis is not None
        append_counts(graph, self.prefix, source, self.bins, channels=channels, weights=self.weights)
        add_outputs(graph, [counts], TensorProto.INT32)
        add_outputs(graph, [top])

    def update(self, outputs: Outputs) -> None:
        """Sums of counts."""
        super().update(outputs)
        if self.batch(outputs) is not None:
            counts = outputs[f"{self.prefix}.bins.counts"].reshape(-1, 2, 1 + self.bins.size)
            self.merge(counts.astype(np.int64), outputs[f"{self.prefix}.bins.top"].reshape(-1).astype(np.int64))

    def merge(self, counts: Counts, top: Octaves) -> None:
        """Add counts that have their own top."""
        if self.counts is None or self.top is None:
            self.counts, self.top = counts, top
            return
        common = np.maximum(self.top, top)
        own, new = self.bins.shifted(self.counts, common - self.top), self.bins.shifted(counts, common - top)
        self.counts, self.top = own + new, common

    def state(self) -> State:
        """low, high, counts, top."""
        if self.counts is None or self.top is None:
            return {}
        return super().state() | {"counts": self.counts, "top": self.top}

    def restore(self, state: State) -> None:
        """From `state`."""
        super().restore(state)
        self.counts, self.top = state.get("counts"), state.get("top")

    def restrained(self, spec: ActivationSpec, low: Array, high: Array) -> float:
        """As far as the squared error of what was seen falls: whatever else a range is chosen by, what it cuts off is
        to be worth it.
        """
        shares = np.linspace(0, 1, _SHARES)
        errors = squared_error(next(self.distributions()), *self.between(shares, low, high), spec)
        return float(shares[np.argmin(errors)])

    def distributions(self) -> Iterator[Distribution]:
        """What was observed of each channel; one for the whole tensor, none before the first batch."""
        if self.counts is None or self.top is None:
            return
        lows, highs = (np.reshape(np.asarray(end, np.float64), -1) for end in (self.low, self.high))
        for counts, top, low, high in zip(self.counts, self.top, lows, highs, strict=True):
            (positive, negative), edges = counts, self.bins.edges(int(top))
            joined = np.concatenate([negative[:0:-1], [negative[0] + positive[0]], positive[1:]])
            yield from_bins(edges, joined, float(low), float(high))

    def per_channel(self, ranges: list[tuple[float, float]]) -> tuple[Array, Array]:
        """Ranges of the channels as arrays, () for the whole tensor."""
        pairs = np.array(ranges, np.float32) + np.float32(0)  # no -0.0
        if not ranges:
            return self.with_zero(None, None)
        return (pairs[0, 0], pairs[0, 1]) if self.axis is None else (pairs[:, 0], pairs[:, 1])

    def plot(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """At most 64 bins of equal width, from the smallest number to the largest one."""
        if self.low is None or self.high is None or np.min(self.low) == np.max(self.high):
            return (), ()
        edges = np.linspace(float(np.min(self.low)), float(np.max(self.high)), _PLOTTED + 1)
        below = np.rint(np.sum([own.below(edges) for own in self.distributions()], axis=0))
        below[0] = 0  # the smallest number itself belongs to the first bin
        return tuple(edges.tolist()), tuple(np.diff(below).astype(int).tolist())
