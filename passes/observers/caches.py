"""Observer of a decoder's cache: how loud each channel of each head is, whatever position a key is turned to."""

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Outputs, State
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.nodes import add_outputs, floats, has, lost
from qcompile.passes.spec import ActivationSpec

# Rows whose peaks are taken for those of all texts.
_MANY = 4096


class CachePeaks(Extremes):
    """The largest magnitudes of a cache (batch, heads, rows, width) by head and channel: low, high (heads, width).

    Rotary embeddings turn a pair of channels by an angle that grows with the position: what lies in one of them here
    lies in the other one further on. So both have the length of the pair, which no position changes.
    Other texts go beyond what a few rows showed, and what is clipped costs much (SmolLM2, 8-bit caches, KL on 512
    tokens: 0.005 by the peaks of 1024 rows, 0.0016 by those of 4096): `expected` is as far beyond them as the largest
    of 4096 normal numbers is, as a rule, beyond that of so few.
    pairs: so many pairs are turned, the i-th of both halves of the first 2 pairs channels, or neighbours
    (interleaved).
    """

    name: ClassVar[str] = "peaks"
    calibrates: ClassVar[bool] = False

    def __init__(self, value: str, width: int = 0, pairs: int = 0, *, interleaved: bool = False) -> None:
        super().__init__(value, axis=-1)
        self.width, self.pairs, self.interleaved, self.rows = width, pairs, interleaved, 0

    @property
    def prefix(self) -> str:
        """Of the names of its nodes."""
        return f"{self.value}.cache"

    def append(self, graph: onnx.GraphProto) -> None:
        """`prefix`.low and .high, float32 (heads, width), .count of its numbers; faults and `lost` as in Extremes."""
        if has(graph, f"{self.prefix}.high"):
            return
        build, source = Builder(graph, self.prefix), floats(graph, self.value)
        sizes = build.node("Abs", [source], "sizes")
        if self.pairs:
            squares = build.node("Mul", [source, source], "squares")
            partner = build.node("Gather", [squares, build.integers(self._partners(), "partners")], "others", axis=3)
            share = numpy_helper.from_array(self._turned().astype(np.float32), f"{self.prefix}.turned")
            graph.initializer.append(share)
            own = build.node("Add", [squares, build.node("Mul", [partner, share.name], "turned_others")], "lengths2")
            sizes = build.node("Sqrt", [own], "lengths")
        axes = numpy_helper.from_array(np.array([0, 2]), f"{self.prefix}.axes")
        graph.initializer.append(axes)
        high = build.node("ReduceMax", [sizes, axes.name], "high", keepdims=0)
        low = build.node("Neg", [high], "low")
        faults = f"{self.value}.faults"
        add_outputs(graph, [low, high, lost(self.value)])
        add_outputs(graph, [build.node("Size", [source], "count")], TensorProto.INT64)
        if not has(graph, faults):
            zeros = build.node("Mul", [source, build.float(0.0)], "zeros")
            build.prefix = self.value
            add_outputs(graph, [build.node("ReduceSum", [zeros], "faults", keepdims=0)])

    def update(self, outputs: Outputs) -> None:
        """Peaks, and how many rows of all heads they are of."""
        super().update(outputs)
        if self.high is not None:
            self.rows += int(outputs[f"{self.prefix}.count"]) // self.high.size

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Both signs of the peaks, whatever the grid."""
        return self.with_zero(self.low, self.high)

    def expected(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """`range` with room where few rows were seen."""
        room = np.float32(max(np.log(_MANY) / np.log(max(self.rows, 2)), 1) ** 0.5)
        low, high = self.range(spec)
        return low * room, high * room

    def state(self) -> State:
        """low, high, row_counts (rows,)."""
        if self.low is None or self.high is None:
            return {}
        return {"low": self.low, "high": self.high, "row_counts": np.array([self.rows])}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.low, self.high = state.get("low"), state.get("high")
        self.rows = int(state.get("row_counts", np.zeros(1))[0])

    def _partners(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """(width,): the channel that each is turned with; its own number without one."""
        channels = np.arange(self.width)
        step = 1 if self.interleaved else self.pairs
        first = channels % 2 == 0 if self.interleaved else channels < self.pairs
        return np.where(self._turned(), np.where(first, channels + step, channels - step), channels)

    def _turned(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.arange(self.width) < 2 * self.pairs
