"""Logarithmic bins: their layout, and the nodes that count a batch into them inside ONNX Runtime."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompile.passes.observers.builder import Builder

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
        """Counts (channels, 2, 1 + size) under a top that lies so many octaves (channels,) higher; maybe the same
        array.
        """
        if not octaves.any():
            return counts
        moved = counts.copy()
        for octave in np.unique(octaves[octaves > 0]):
            rows, step = octaves == octave, min(int(octave) * self.per_octave, self.size)
            higher = np.zeros_like(counts[rows])
            higher[:, :, 1 : 1 + self.size - step] = counts[rows, :, 1 + step :]
            higher[:, :, 0] = counts[rows, :, : 1 + step].sum(axis=-1)
            moved[rows] = higher
        return moved


# Finer than the step of an 8-bit grid for all but the largest third of it, and wide enough for 16 bits behind a value
# 2^12 times the others. Channels have coarser ones: 6 kB each instead of 32.
TENSOR, CHANNEL = Bins(64, 32), Bins(16, 24)


def append_counts(
    graph: onnx.GraphProto, prefix: str, source: str, bins: Bins, *, channels: bool, weights: Counts | None = None
) -> None:
    """Append `prefix`.bins.top, float32 () or (channels,), the octave above the largest magnitude of `source`, and
    `prefix`.bins.counts, int32 (channels * 2 * (1 + size),). `prefix`.low and .high are there.

    weights: what a number counts for, of a shape that broadcasts to that of the value `prefix`; 1 without.
    """
    build = Builder(graph, f"{prefix}.bins")
    top = _top(build, f"{prefix}.low", f"{prefix}.high")
    index = _signed(build, source, _magnitude(build, source, top, bins, channels=channels), bins)
    size = width = build.long(2 * (1 + bins.size))
    if channels:
        size = build.node("Mul", [build.node("Shape", [f"{prefix}.low"], "channels"), width], "size")
        index = build.node("Add", [index, _first_of_channel(build, size, width)], "index.channel")
    flat = build.node("Reshape", [index, build.long(-1)], "index.flat")
    if weights is None:
        each = build.filled(build.node("Shape", [flat], "numbers"), 1, "ones")
    else:
        shape = build.node("Shape", [prefix], "shape")  # of the value: `source` may be flat
        spread = build.node("Expand", [build.integers(weights, "weights"), shape], "each")
        each = build.node("Reshape", [spread, build.long(-1)], "each.flat")
    zeros = build.filled(size, 0, "zeros")
    build.node("ScatterElements", [zeros, flat, each], "counts", axis=0, reduction="add")


def _top(build: Builder, low: str, high: str) -> str:
    """1 + floor(log2 max|x|), from the extremes; of a batch of zeros that of the smallest normal float32."""
    most = build.node("Max", [high, build.node("Neg", [low], "-low"), build.float(_LEAST)], "most")
    log2 = build.node("Mul", [build.node("Log", [most], "most.log"), build.float(1 / math.log(2))], "most.log2")
    return build.node("Add", [build.node("Floor", [log2], "octave"), build.float(1.0)], "top")


def _magnitude(build: Builder, source: str, top: str, bins: Bins, *, channels: bool) -> str:
    """The bin of |x|, int32, without its sign.

    Conversion to int32 truncates, which is floor here: what is below 1 belongs to bin 0. Clipping comes after it, so
    that the index of a NaN is valid too, whatever a processor converts it to.
    """
    base = build.node("Mul", [top, build.float(bins.per_octave)], "top.bins")
    base = build.node("Sub", [base, build.float(bins.size + 1)], "base")
    if channels:
        base = build.node("Unsqueeze", [base, build.long(1)], "base.channel")
    log = build.node("Log", [build.node("Abs", [source], "abs")], "log")
    position = build.node("Mul", [log, build.float(bins.per_octave / math.log(2))], "position")
    position = build.node("Sub", [position, base], "position.top")
    whole = build.node("Cast", [position], "whole", to=TensorProto.INT32)
    return build.node("Clip", [whole, build.integer(0), build.integer(bins.size)], "magnitude")


def _signed(build: Builder, source: str, magnitude: str, bins: Bins) -> str:
    """The bins of negative numbers lie behind those of the others."""
    negative = build.node("Less", [source, build.float(0.0)], "negative")
    side = build.node("Where", [negative, build.integer(1 + bins.size), build.integer(0)], "side")
    return build.node("Add", [magnitude, side], "index")


def _first_of_channel(build: Builder, size: str, width: str) -> str:
    """The index of the first bin of every channel, int32 (channels, 1)."""
    ends = [(build.long(0), "start"), (size, "stop"), (width, "step")]
    bounds = [build.node("Squeeze", [given], f"range.{end}") for given, end in ends]
    first = build.node("Cast", [build.node("Range", bounds, "range")], "first", to=TensorProto.INT32)
    return build.node("Unsqueeze", [first, build.long(1)], "first.channel")
