"""Room for rows to come: how far the extremes of many rows reach beyond those of the few that were seen."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.nodes import add_outputs, floats

Numbers = npt.NDArray[np.float64]
Sums = npt.NDArray[np.float64]

# Rows up to which no choice to clip counts, and from which on it is taken as it was made.
_FEW, _ENOUGH = 64, 128
# What is taken to be known of the extremes of rows before any: their spread relative to the largest, as so many rows.
_SPREAD, _PRIOR = 0.15, 2
# The scale of a Gumbel distribution relative to its standard deviation.
_GUMBEL = math.sqrt(6) / math.pi
# Steps of a grid on each side of zero; and rows to come of which one may go beyond the room that is given at most: who
# has seen as many needs none.
_STEPS, _RARE = 127, 1024


@dataclass
class RowExtremes:
    """How the extremes of single rows vary.

    sums: float64 (2, 2): of the magnitudes of rows' lowest numbers (below zero) and highest ones (above), and of their
    squares. rows: how many. numbers: in all of them. A row is what has a place of its own: a token, a line of a matrix;
    of a value of rank 4 and more, as convolutions have, a picture.
    """

    rows: int = 0
    numbers: int = 0
    sums: Sums | None = None

    @classmethod
    def of(cls, matrix: Array) -> "RowExtremes":
        """Those of a matrix (n, K)."""
        found = cls()
        found.add(matrix.min(axis=1), matrix.max(axis=1), matrix.shape[1])
        return found

    def add(self, low: Array, high: Array, width: int) -> None:
        """Rows' lowest and highest numbers, both (n,), and the numbers in each."""
        ends = np.stack([np.maximum(-low.astype(np.float64), 0), np.maximum(high.astype(np.float64), 0)])
        own = np.stack([ends.sum(axis=1), np.square(ends).sum(axis=1)])
        self.sums = own if self.sums is None else self.sums + own
        self.rows += len(low)
        self.numbers += len(low) * width

    def standing_for(self, rows: int) -> "RowExtremes":
        """The same as that of so many rows, of which these are a fair sample."""
        share = rows / max(self.rows, 1)
        return RowExtremes(rows, round(share * self.numbers), None if self.sums is None else share * self.sums)

    def widened(self, chosen: tuple[float, float], extremes: tuple[float, float]) -> tuple[float, float]:
        """The range `chosen` within the `extremes` (low, high), for rows to come.

        Case 1: few rows say little about what lies beyond a range within their extremes: it is the extremes; from
                `_FEW` to `_ENOUGH` rows it goes over to the one that was chosen.
        Case 2: they have not shown the extremes either: both ends get `room`. Ends that lie at zero stay there.
        """
        if self.sums is None or not self.rows:
            return chosen
        share = min(1.0, max(0.0, (self.rows - _FEW) / (_ENOUGH - _FEW)))
        most = (max(-extremes[0], 0.0), max(extremes[1], 0.0))
        ends = []
        for end, own, extreme in zip(range(2), (-chosen[0], chosen[1]), most, strict=True):
            settled = extreme + share * (own - extreme)
            ends.append(settled * (1 + self.room(end, extreme) / extreme) if extreme > 0 else settled)
        return -ends[0], ends[1]

    def room(self, end: int, extreme: float) -> float:
        """How far beyond its extreme an end (0 low, 1 high) lies where rounding and cutting off cost least together.

        Of rows to come, one in rows + 1 goes beyond the extreme, by a number that is exponential with scale s, whatever
        the tail of the usual kinds (Gumbel). With room r it costs 2 s² exp(-r / s) / (rows + 1) a row, and rounding its
        m numbers m ((extreme + r) / 127)² / 12: many numbers want a fine grid, and a few a wide one. At most the room
        that one in `_RARE` rows goes beyond.
        """
        scale = self.scale(end, extreme)
        if not scale > 0 or self.rows >= _RARE:
            return 0.0
        rooms = np.linspace(0, math.log(_RARE / self.rows), 65) * scale
        width = self.numbers / self.rows
        rounding = width * np.square((extreme + rooms) / _STEPS / 2) / 12
        return float(rooms[np.argmin(rounding + 2 * scale**2 * self.beyond(rooms, scale))])

    def beyond(self, room: Numbers, scale: float) -> Numbers:
        """The share of rows to come that go beyond an extreme with so much room."""
        return np.asarray(np.exp(-np.asarray(room) / scale) / (self.rows + 1))

    def scale(self, end: int, extreme: float) -> float:
        """The scale of the Gumbel distribution that rows' extremes at an end have, where `extreme` is the largest
        magnitude: about as far beyond a bound lies what goes beyond it.
        """
        if not extreme > 0 or self.sums is None:
            return 0.0
        total, squares = self.sums[:, end]
        known = _PRIOR * (_SPREAD * extreme) ** 2
        variance = (max(squares - total**2 / self.rows, 0.0) + known) / (self.rows - 1 + _PRIOR)
        return float(_GUMBEL * math.sqrt(variance))


def append_row_extremes(graph: onnx.GraphProto, value: str) -> None:
    """Append `value`.row.low and .high, float32 (n,), and .row.numbers, int64 (1,), in each row, as outputs."""
    build = Builder(graph, f"{value}.row")
    one, axis = build.long(1), build.long(1)
    shape = build.node("Shape", [value], "shape")
    rank = build.node("Size", [shape], "rank")
    few = build.node("Less", [rank, build.node("Squeeze", [build.long(4)], "four")], "few")
    sizes = []
    for end, by_token, by_picture in (("count", {"end": -1}, {"end": 1}), ("width", {"start": -1}, {"start": 1})):
        products = []
        for kind, ends in (("token", by_token), ("picture", by_picture)):
            part = build.node("Shape", [value], f"{end}.{kind}", **ends)
            padded = build.node("Concat", [one, part], f"{end}.{kind}.padded", axis=0)
            products.append(build.node("ReduceProd", [padded], f"{end}.{kind}.product", keepdims=1))
        sizes.append(build.node("Where", [few, *products], end))
    matrix = build.node(
        "Reshape", [floats(graph, value), build.node("Concat", sizes, "matrix", axis=0)], "rows", allowzero=1
    )
    build.node("Identity", [sizes[1]], "numbers")
    add_outputs(graph, [f"{value}.row.numbers"], TensorProto.INT64)
    for operator, end in (("ReduceMin", "low"), ("ReduceMax", "high")):
        build.node(operator, [matrix, axis], end, keepdims=0)
    add_outputs(graph, [f"{value}.row.low", f"{value}.row.high"])
