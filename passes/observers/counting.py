"""Logarithmic bins: their layout, and the nodes that count a batch into them inside ONNX Runtime."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.passes.observers.nodes import constant, scalar

Counts = npt.NDArray[np.int64]
Octaves = npt.NDArray[np.int64]

# The smallest magnitude that a batch's top octave is taken from (about the smallest normal float32).
_LEAST = np.float32(2.0**-126)


@dataclass(frozen=True)
class Bins:
    """Bins of each sign: bin 0 holds what lies more than `octaves` below the top, bin i the magnitudes from
    2^(top - octaves + (i - 1) / per_octave) to 2^(top - octaves + i / per_octave).
    """

    per_octave: int
    octaves: int

    @property
    def size(self) -> int:
        """Bins of one sign, without bin 0."""
        return self.per_octave * self.octaves

    def edges(self, top: int) -> npt.NDArray[np.float64]:
        """Edges of the bins of both signs, (2 size + 2,): the two bins 0 are one around zero."""
        magnitudes = np.exp2(top - self.octaves + np.arange(self.size + 1) / self.per_octave)
        return np.concatenate([-magnitudes[::-1], magnitudes])

    def shifted(self, counts: Counts, octaves: Octaves) -> Counts:
        """Counts (channels, 2, 1 + size) under a top that lies so many octaves (channels,) higher."""
        moved = counts.copy()
        for octave in np.unique(octaves[octaves > 0]):
            rows, step = octaves == octave, min(int(octave) * self.per_octave, self.size)
            moved[rows] = 0
            moved[rows, :, 1 : 1 + self.size - step] = counts[rows, :, 1 + step :]
            moved[rows, :, 0] = counts[rows, :, : 1 + step].sum(axis=-1)
        return moved


# Finer than the step of an 8-bit grid for all but the largest third of it, and wide enough for 16 bits behind a value
# 2^12 times the others. Channels have coarser ones: 6 kB each instead of 32.
TENSOR, CHANNEL = Bins(64, 32), Bins(16, 24)


def append_counts(graph: onnx.GraphProto, prefix: str, source: str, bins: Bins, *, channels: bool) -> None:
    """Append `prefix`.bins.top, float32 () or (channels,), the octave above the largest magnitude of `source`, and
    `prefix`.bins.counts, int32 (channels * 2 * (1 + size),). `prefix`.low and .high are there.
    """
    _Counting(graph, prefix, bins, channels=channels).append(source)


class _Counting:
    """Appends nodes whose outputs begin with a prefix."""

    def __init__(self, graph: onnx.GraphProto, prefix: str, bins: Bins, *, channels: bool) -> None:
        self.graph, self.prefix, self.bins, self.channels = graph, prefix, bins, channels

    def append(self, source: str) -> None:
        """All of them."""
        index = self._signed(source, self._magnitude(source, self._top()))
        width = constant(self.graph, f"qcompile.width{self.bins.size}", [2 * (1 + self.bins.size)])
        if self.channels:
            size = self._node("Mul", [self._node("Shape", [f"{self.prefix}.low"], "channels"), width], "size")
            index = self._node("Add", [index, self._first_of_channel(size, width)], "index.channel")
        else:
            size = width
        flat = self._node("Reshape", [index, constant(self.graph, "qcompile.minus1", [-1])], "index.flat")
        zeros = self._filled(size, 0, "zeros")
        ones = self._filled(self._node("Shape", [flat], "numbers"), 1, "ones")
        self._node("ScatterElements", [zeros, flat, ones], "counts", axis=0, reduction="add")

    def _top(self) -> str:
        """1 + floor(log2 max|x|), from the extremes; of a batch of zeros that of the smallest normal float32."""
        negated = self._node("Neg", [f"{self.prefix}.low"], "-low")
        most = self._node("Max", [f"{self.prefix}.high", negated, self._float(_LEAST)], "most")
        log2 = self._node("Mul", [self._node("Log", [most], "most.log"), self._float(1 / math.log(2))], "most.log2")
        return self._node("Add", [self._node("Floor", [log2], "octave"), self._float(1.0)], "top")

    def _magnitude(self, source: str, top: str) -> str:
        """The bin of |x|, int32, without its sign.

        Conversion to int32 truncates, which is floor here: what is below 1 belongs to bin 0. Clipping comes after it,
        so that the index of a NaN is valid too, whatever a processor converts it to.
        """
        per_octave, size = self.bins.per_octave, self.bins.size
        base = self._node("Mul", [top, self._float(per_octave)], "top.bins")
        base = self._node("Sub", [base, self._float(size + 1)], "base")
        if self.channels:
            base = self._node("Unsqueeze", [base, constant(self.graph, "qcompile.axis1", [1])], "base.channel")
        log = self._node("Log", [self._node("Abs", [source], "abs")], "log")
        position = self._node("Mul", [log, self._float(per_octave / math.log(2))], "position")
        position = self._node("Sub", [position, base], "position.top")
        whole = self._node("Cast", [position], "whole", to=TensorProto.INT32)
        return self._node("Clip", [whole, self._integer(0), self._integer(size)], "magnitude")

    def _signed(self, source: str, magnitude: str) -> str:
        """The bins of negative numbers lie behind those of the others."""
        negative = self._node("Less", [source, self._float(0.0)], "negative")
        side = self._node("Where", [negative, self._integer(1 + self.bins.size), self._integer(0)], "side")
        return self._node("Add", [magnitude, side], "index")

    def _first_of_channel(self, size: str, width: str) -> str:
        """The index of the first bin of every channel, int32 (channels, 1)."""
        start, stop, step = (
            self._node("Squeeze", [given], f"range.{end}")
            for given, end in ((constant(self.graph, "qcompile.index0", [0]), "0"), (size, "stop"), (width, "step"))
        )
        first = self._node("Cast", [self._node("Range", [start, stop, step], "range")], "first", to=TensorProto.INT32)
        return self._node("Unsqueeze", [first, constant(self.graph, "qcompile.axis1", [1])], "first.channel")

    def _filled(self, shape: str, number: int, end: str) -> str:
        value = numpy_helper.from_array(np.array([number], np.int32))
        return self._node("ConstantOfShape", [shape], end, value=value)

    def _float(self, number: float | np.float32) -> str:
        return scalar(self.graph, f"qcompile.float{float(number)}", np.float32(number))

    def _integer(self, number: int) -> str:
        return scalar(self.graph, f"qcompile.int{number}", np.int32(number))

    def _node(self, operator: str, inputs: list[str], end: str, **attributes: object) -> str:
        output = f"{self.prefix}.bins.{end}"
        self.graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
        return output
