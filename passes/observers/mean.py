"""The mean of an activation."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.nodes import add_outputs, by_channel, constant, has
from qcompile.passes.spec import ActivationSpec


class Mean(Observer):
    """The mean of every channel, of all numbers and of two halves of them that say whether it is more than chance.

    totals: float64 (2, channels), sums of the numbers of each half; counts: how many a channel has had in each. A batch
    is cut into its first and its second half of numbers (as they lie: tokens, pictures), which go to the halves in
    turn, so that batches of one row are divided, too.
    """

    name: ClassVar[str] = "mean"

    def __init__(self, value: str, *, axis: int = -1) -> None:
        super().__init__(value, axis=axis)
        self.totals: npt.NDArray[np.float64] = np.zeros((2, 0))
        self.counts, self.batches = [0, 0], 0

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.total.0 and .1 (channels,), float32, of the halves of a batch; `value`.count (1,), int64: numbers of
        a channel.
        """
        build = Builder(graph, self.value)
        if has(graph, f"{self.value}.total.0"):
            return
        source = by_channel(graph, self.value, self.axis)
        axis = constant(graph, "qcompile.axis1", [1])
        count = build.node("Shape", [source], "count", start=1)
        middle = build.node("Div", [count, build.long(2)], "middle")
        for half, (first, last) in enumerate(((build.long(0), middle), (middle, count))):
            part = build.node("Slice", [source, first, last, axis], f"half.{half}")
            build.node("ReduceSum", [part, axis], f"total.{half}", keepdims=0)
        add_outputs(graph, [f"{self.value}.total.{half}" for half in range(2)])
        add_outputs(graph, [count], TensorProto.INT64)

    def update(self, outputs: Outputs) -> None:
        """Sums."""
        totals = np.stack([outputs[f"{self.value}.total.{half}"] for half in range(2)]).astype(np.float64)
        count = int(outputs[f"{self.value}.count"][0])
        self.check_finite(totals)
        counts = [count // 2, count - count // 2]
        if self.batches % 2:
            totals, counts = totals[::-1], counts[::-1]
        self.totals = self.totals + totals if self.count else totals
        self.counts = [own + new for own, new in zip(self.counts, counts, strict=True)]
        self.batches += 1

    @property
    def count(self) -> int:
        """How many numbers each channel has had."""
        return sum(self.counts)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """float64 (channels,); call it behind the first batch that has numbers."""
        return np.asarray(self.totals.sum(axis=0) / self.count)

    @property
    def halves(self) -> npt.NDArray[np.float64] | None:
        """The means of both halves, float64 (2, channels); None where one has no numbers."""
        return None if 0 in self.counts else self.totals / np.array(self.counts)[:, None]

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """From zero to the mean of each channel."""
        mean = np.asarray(self.mean if self.count else 0, np.float32)
        return np.minimum(mean, np.float32(0)), np.maximum(mean, np.float32(0))

    def state(self) -> State:
        """totals, counts, batches."""
        known = {"totals": self.totals, "counts": np.array(self.counts), "batches": np.array(self.batches)}
        return known if self.count else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.totals = np.asarray(state.get("totals", np.zeros((2, 0))))
        self.counts = [int(own) for own in state.get("counts", (0, 0))]
        self.batches = int(state.get("batches", 0))
