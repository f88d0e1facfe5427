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

    totals: float64 (2, 2, channels), sums of the numbers by batch (even, odd) and by half of a batch; counts: int64
    (2, 2), how many a channel has had in each. The halves of a batch are its first and its last numbers as they lie
    (tokens, pictures): of one picture, or one text, they share what is particular to it, and agree by that alone. So
    the two halves of the data are its even and its odd batches, and those of a batch only where there is no other.
    """

    name: ClassVar[str] = "mean"

    def __init__(self, value: str, *, axis: int = -1) -> None:
        super().__init__(value, axis=axis)
        self.totals: npt.NDArray[np.float64] = np.zeros((2, 2, 0))
        self.counts: npt.NDArray[np.int64] = np.zeros((2, 2), np.int64)
        self.batches = 0

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
        if not count:
            return
        if not self.count:
            self.totals = np.zeros((2, *totals.shape))
        self.totals[self.batches % 2] += totals
        self.counts[self.batches % 2] += [count // 2, count - count // 2]
        self.batches += 1

    @property
    def count(self) -> int:
        """How many numbers each channel has had."""
        return int(self.counts.sum())

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """float64 (channels,); call it behind the first batch that has numbers."""
        return np.asarray(self.totals.sum(axis=(0, 1)) / self.count)

    @property
    def halves(self) -> npt.NDArray[np.float64] | None:
        """The means of both halves, float64 (2, channels); None where one has no numbers."""
        axis = 1 if self.batches > 1 else 0
        totals, counts = self.totals.sum(axis=axis), self.counts.sum(axis=axis)
        return None if 0 in counts else totals / counts[:, None]

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """From zero to the mean of each channel."""
        mean = np.asarray(self.mean if self.count else 0, np.float32)
        return np.minimum(mean, np.float32(0)), np.maximum(mean, np.float32(0))

    def state(self) -> State:
        """totals, counts, batches."""
        known = {"totals": self.totals, "counts": self.counts, "batches": np.array(self.batches)}
        return known if self.count else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.totals = np.asarray(state.get("totals", np.zeros((2, 2, 0))), np.float64).copy()
        self.counts = np.asarray(state.get("counts", np.zeros((2, 2))), np.int64).copy()
        self.batches = int(state.get("batches", 0))
