"""How far each channel of an activation goes, batch by batch."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.nodes import add_outputs, by_channel, constant, has, lost
from qcompile.passes.spec import ActivationSpec


class Extents(Observer):
    """The extremes of each channel in each batch, zero among them, and the mean of its squares.

    low, high, power: float32 (batches, channels); batches without a finite row, or without a number, have no row.
    """

    name: ClassVar[str] = "extents"
    calibrates: ClassVar[bool] = False

    def __init__(self, value: str, *, axis: int = 1) -> None:
        super().__init__(value, axis=axis)
        self._rows: list[npt.NDArray[np.float32]] = []

    @property
    def low(self) -> Array:
        """Minima, at most 0."""
        return self._stacked(0)

    @property
    def high(self) -> Array:
        """Maxima, at least 0."""
        return self._stacked(1)

    @property
    def power(self) -> Array:
        """Means of squares."""
        return self._stacked(2)

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.extents.low, .high, .power, float32 (channels,); .count, int64 (1,)."""
        build = Builder(graph, f"{self.value}.extents")
        if has(graph, f"{self.value}.extents.low"):
            return
        source, axis = by_channel(graph, self.value, self.axis), constant(graph, "qcompile.axis1", [1])
        count = build.node("Shape", [source], "count", start=1)
        zero = build.node("Mul", [source, build.float(0)], "nothing")  # NaN where a number is not finite
        for end, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
            padded = build.node("Pad", [source, constant(graph, "qcompile.pad1", [0, 0, 0, 1])], f"{end}.padded")
            build.node(operator, [padded, axis], end, keepdims=0)
        build.node("ReduceSumSquare", [source, axis], "power", keepdims=0)
        build.node("ReduceSum", [zero], "faults", keepdims=0)
        add_outputs(graph, [f"{build.prefix}.{end}" for end in ("low", "high", "power", "faults")])
        add_outputs(graph, [count], onnx.TensorProto.INT64)
        add_outputs(graph, [own for own in [lost(self.value)] if own not in {o.name for o in graph.output}])

    def update(self, outputs: Outputs) -> None:
        """A row of each."""
        low, high, power, faults, count = (
            outputs[f"{self.value}.extents.{end}"] for end in ("low", "high", "power", "faults", "count")
        )
        self.check_finite(faults)
        if int(count[0]) and outputs[lost(self.value)] != 1:
            self._rows.append(np.stack([low, high, power / np.float32(count[0])]).astype(np.float32))

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """From the smallest to the largest number of each channel."""
        return self.low.min(axis=0, initial=0), self.high.max(axis=0, initial=0)

    def state(self) -> State:
        """rows (batches, 3, channels)."""
        return {"rows": np.stack(self._rows)} if self._rows else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        self._rows = list(state["rows"]) if "rows" in state else []

    def _stacked(self, which: int) -> Array:
        return np.array([row[which] for row in self._rows], np.float32)
