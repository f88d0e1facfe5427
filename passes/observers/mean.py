"""The mean of an activation."""

from collections.abc import Sequence
from itertools import pairwise
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

# What the numbers are divided into, by batch and within a batch.
PARTS = 4


class Mean(Observer):
    """The mean of every channel: of all numbers, and of each of four parts of them.

    Parts 0 and 2 are what something is fitted to where parts 1 and 3 are held aside to judge it. The batches go to them
    in turn. The numbers of one batch, as they lie (tokens, pictures), share what is particular to a text or a picture
    and agree by that alone; so the parts are its quarters only where there are fewer batches than parts.
    totals: float64 (4, 4, channels), sums of the numbers by batch and by quarter of a batch; counts: int64 (4, 4), how
    many a channel has had in each. every: it sees one of so many batches alone, beginning with the first.
    """

    name: ClassVar[str] = "mean"

    def __init__(self, value: str, *, axis: int = -1, every: int = 1) -> None:
        super().__init__(value, axis=axis)
        self.every = every
        self.totals: npt.NDArray[np.float64] = np.zeros((PARTS, PARTS, 0))
        self.counts: npt.NDArray[np.int64] = np.zeros((PARTS, PARTS), np.int64)
        self.batches = 0

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.total.0 to .3 (channels,), float32, of the quarters of a batch; `value`.count (1,), int64: numbers of
        a channel.
        """
        build = Builder(graph, self.value)
        if has(graph, f"{self.value}.total.0"):
            return
        source = by_channel(graph, self.value, self.axis)
        axis = constant(graph, "qcompile.axis1", [1])
        count = build.node("Shape", [source], "count", start=1)
        ends = [build.long(0)]
        for number in range(1, PARTS):
            times = build.node("Mul", [count, build.long(number)], f"times.{number}")
            ends.append(build.node("Div", [times, build.long(PARTS)], f"end.{number}"))
        for number, (first, last) in enumerate(pairwise([*ends, count])):
            part = build.node("Slice", [source, first, last, axis], f"part.{number}")
            build.node("ReduceSum", [part, axis], f"total.{number}", keepdims=0)
        add_outputs(graph, [f"{self.value}.total.{number}" for number in range(PARTS)])
        add_outputs(graph, [count], TensorProto.INT64)

    def update(self, outputs: Outputs) -> None:
        """Sums."""
        totals = np.stack([outputs[f"{self.value}.total.{number}"] for number in range(PARTS)]).astype(np.float64)
        count = int(outputs[f"{self.value}.count"][0])
        self.check_finite(totals)
        own = self.batches % PARTS
        self.batches += self.every  # one without numbers counts: what is held aside is told by the order of the data
        if not count:
            return
        if not self.count:
            self.totals = np.zeros((PARTS, *totals.shape))
        self.totals[own] += totals
        self.counts[own] += np.diff(count * np.arange(PARTS + 1) // PARTS)

    @property
    def count(self) -> int:
        """How many numbers each channel has had."""
        return int(self.counts.sum())

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """float64 (channels,); call it behind the first batch that has numbers."""
        return np.asarray(self.totals.sum(axis=(0, 1)) / self.count)

    def means(self, *groups: Sequence[int]) -> npt.NDArray[np.float64] | None:
        """The mean of each group of parts, float64 (groups, channels); None where one has no numbers."""
        axis = 1 if self.batches >= PARTS else 0
        totals, counts = self.totals.sum(axis=axis), self.counts.sum(axis=axis)
        sums = [(totals[list(group)].sum(axis=0), int(counts[list(group)].sum())) for group in groups]
        return None if any(not count for _, count in sums) else np.stack([total / count for total, count in sums])

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
        self.totals = np.asarray(state.get("totals", np.zeros((PARTS, PARTS, 0))), np.float64).copy()
        self.counts = np.asarray(state.get("counts", np.zeros((PARTS, PARTS))), np.int64).copy()
        self.batches = int(state.get("batches", 0))
