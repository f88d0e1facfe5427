"""The mean of an activation."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.nodes import add_outputs, by_channel, constant
from qcompile.passes.spec import ActivationSpec


class Mean(Observer):
    """The mean of every channel. total: float64 (channels,), the sum of its numbers; count: how many each has had."""

    name: ClassVar[str] = "mean"

    def __init__(self, value: str, *, axis: int = -1) -> None:
        super().__init__(value, axis=axis)
        self.total: npt.NDArray[np.float64] = np.zeros(0)
        self.count = 0

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.total (channels,), float32; `value`.count (1,), int64: numbers of a channel."""
        total, count = f"{self.value}.total", f"{self.value}.count"
        if any(total in node.output for node in graph.node):
            return
        source = by_channel(graph, self.value, self.axis)
        axis = constant(graph, "qcompile.axis1", [1])
        graph.node.append(helper.make_node("ReduceSum", [source, axis], [total], keepdims=0))
        graph.node.append(helper.make_node("Shape", [source], [count], start=1))
        add_outputs(graph, [total])
        add_outputs(graph, [count], TensorProto.INT64)

    def update(self, outputs: Outputs) -> None:
        """Sums."""
        total, count = outputs[f"{self.value}.total"], int(outputs[f"{self.value}.count"][0])
        self.check_finite(total)
        self.total = self.total + total if self.count else np.asarray(total, np.float64)
        self.count += count

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """float64 (channels,); call it behind the first batch that has numbers."""
        return self.total / self.count

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """From zero to the mean of each channel."""
        mean = np.asarray(self.mean if self.count else 0, np.float32)
        return np.minimum(mean, np.float32(0)), np.maximum(mean, np.float32(0))

    def state(self) -> State:
        """total, count."""
        return {"total": self.total, "count": np.array(self.count)} if self.count else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.total, self.count = np.asarray(state.get("total", np.zeros(0))), int(state.get("count", 0))
