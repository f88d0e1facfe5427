"""Room for rows to come: how far the extremes of many rows reach beyond those of the few that were seen."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.nodes import add_outputs, floats, producer

Sums = npt.NDArray[np.float64]
Ends = npt.NDArray[np.floating]

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

    A row is what has a place of its own: a token, a line of a matrix; of a value of rank 4 and more, as convolutions
    have, a position of a picture. Rows of one picture are no independent sample: see `independent`.
    rows, groups: how many, and in how many pictures; what is no picture is a group by itself. numbers: in all rows.
    sums: float64 (2, 6): of the magnitudes of rows' lowest numbers (below zero) and highest ones (above), and of their
    squares; of the groups' means of them, and of the squares of those; of the groups' largest, and of their squares.
    """

    rows: int = 0
    numbers: int = 0
    groups: int = 0
    sums: Sums | None = None

    @classmethod
    def of(cls, matrix: Array) -> "RowExtremes":
        """Those of a matrix (n, K)."""
        ends = np.stack([-matrix.min(axis=1), matrix.max(axis=1)]).clip(0).astype(np.float64)
        found = cls()
        found.add(ends, np.square(ends), ends, 1, matrix.shape[1])
        return found

    def add(self, totals: Ends, squares: Ends, peaks: Ends, positions: int, width: int) -> None:
        """Of the magnitudes of the low and high ends of each group's rows the sums, those of squares and the largest,
        (2, groups) each; the rows in each group, and the numbers in each row.
        """
        most = np.asarray(peaks, np.float64)
        means = np.asarray(totals, np.float64) / max(positions, 1)
        parts = (positions * means, np.asarray(squares, np.float64), means, means**2, most, most**2)
        own = np.stack([part.sum(axis=1) for part in parts], axis=1)
        self.sums = own if self.sums is None else self.sums + own
        self.rows += positions * totals.shape[1]
        self.groups += totals.shape[1]
        self.numbers += positions * totals.shape[1] * width

    def standing_for(self, rows: int) -> "RowExtremes":
        """The same as that of so many rows, of which these are a fair sample."""
        share = rows / max(self.rows, 1)
        groups, sums = round(share * self.groups), None if self.sums is None else share * self.sums
        return RowExtremes(rows, round(share * self.numbers), groups, sums)

    def independent(self, end: int) -> float:
        """How many independent rows say as much of the extremes at an end (0 low, 1 high): between groups and rows.

        The mean over a picture varies from one to the next more than that of as many independent rows would, by what
        Kish calls the design effect. Before any picture it is taken to be the square root of the rows of one.
        """
        if self.sums is None or self.groups == self.rows:
            return self.rows
        total, squares, means, means2 = self.sums[end, :4]
        each = self.rows / self.groups
        variance = max(squares / self.rows - (total / self.rows) ** 2, 0.0)
        between = max(means2 - means**2 / self.groups, 0.0)
        seen = between / variance if variance > 0 else (self.groups - 1) / math.sqrt(each)
        ratio = (seen + _PRIOR / math.sqrt(each)) / (self.groups - 1 + _PRIOR)
        return self.groups / min(max(ratio, 1 / each), 1.0)

    def reaching(self, end: int, bound: float, extreme: float) -> float:
        """The share of pictures that reach beyond a bound, where `extreme` is the largest magnitude: what is cut off is
        known by these alone. 1 without pictures. The largest of each are taken to have a Gumbel distribution.
        """
        if self.sums is None or self.groups == self.rows or not extreme > 0:
            return 1.0
        total, squares = self.sums[end, 4:]
        scale = _gumbel(total, squares, self.groups, extreme)
        location = total / self.groups - np.euler_gamma * scale
        return -math.expm1(-math.exp(min((location - bound) / scale, 50.0)))

    def widened(self, chosen: tuple[float, float], extremes: tuple[float, float]) -> tuple[float, float]:
        """The range `chosen` within the `extremes` (low, high), for rows to come.

        Case 1: few rows say little about what lies beyond a range within their extremes: it is the extremes; from
                `_FEW` to `_ENOUGH` rows it goes over to the one that was chosen.
        Case 2: they have not shown the extremes either: both ends get `room`. Ends that lie at zero stay there.
        """
        if self.sums is None or not self.rows:
            return chosen
        most = (max(-extremes[0], 0.0), max(extremes[1], 0.0))
        ends = []
        for end, own, extreme in zip(range(2), (-chosen[0], chosen[1]), most, strict=True):
            known = self.independent(end) * self.reaching(end, own, extreme)
            share = min(1.0, max(0.0, (known - _FEW) / (_ENOUGH - _FEW)))
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
        scale, known = self.scale(end, extreme), self.independent(end)
        if not scale > 0 or known >= _RARE:
            return 0.0
        width = self.numbers / self.rows
        low, high = 0.0, math.log(_RARE / known) * scale
        for _ in range(40):  # where the derivative of the cost, which rises, goes through zero
            room = (low + high) / 2
            rounding = width * (extreme + room) / (6 * (2 * _STEPS) ** 2)
            low, high = (low, room) if rounding > 2 * scale * self.beyond(room, scale, end) else (room, high)
        return high

    def beyond(self, room: float, scale: float, end: int) -> float:
        """The share of rows to come that go beyond an extreme with so much room."""
        return math.exp(-room / scale) / (self.independent(end) + 1)

    def scale(self, end: int, extreme: float) -> float:
        """The scale of the Gumbel distribution that rows' extremes at an end have, where `extreme` is the largest
        magnitude: about as far beyond a bound lies what goes beyond it.
        """
        if not extreme > 0 or self.sums is None:
            return 0.0
        total, squares = self.sums[end, :2]
        return _gumbel(total, squares, self.rows, extreme)


def _gumbel(total: float, squares: float, count: int, extreme: float) -> float:
    """The scale of the Gumbel distribution of so many extremes of such sums, the largest of all being `extreme`."""
    known = _PRIOR * (_SPREAD * extreme) ** 2
    variance = (max(squares - total**2 / count, 0.0) + known) / (count - 1 + _PRIOR)
    return _GUMBEL * math.sqrt(variance)


def append_row_extremes(graph: onnx.GraphProto, value: str) -> None:
    """Append what `RowExtremes.add` takes in as outputs: `value`.row.totals, .squares and .peaks, float32 (2, groups),
    and `value`.row.sizes, int64 (2,).
    """
    build, value = Builder(graph, f"{value}.row"), _upright(graph, value)
    one, axis = build.long(1), build.long(1)
    shape = build.node("Shape", [value], "shape")
    rank = build.node("Size", [shape], "rank")
    few = build.node("Less", [rank, build.node("Squeeze", [build.long(4)], "four")], "few")
    dimensions: list[tuple[str, dict[str, int], dict[str, int]]] = [
        ("groups", {"end": -1}, {"end": 1}),
        ("width", {"start": -1}, {"start": 1, "end": 2}),
        ("positions", {"start": 0, "end": 0}, {"start": 2}),
    ]
    sizes = []
    for end, by_token, by_picture in dimensions:
        products = []
        for kind, bounds in (("token", by_token), ("picture", by_picture)):
            part = build.node("Shape", [value], f"{end}.{kind}", **bounds)
            padded = build.node("Concat", [one, part], f"{end}.{kind}.padded", axis=0)
            products.append(build.node("ReduceProd", [padded], f"{end}.{kind}.product", keepdims=1))
        sizes.append(build.node("Where", [few, *products], end))
    three = build.node("Concat", sizes, "three", axis=0)
    pictures = build.node("Reshape", [floats(graph, value), three], "pictures", allowzero=1)
    lowest = build.node("Neg", [build.node("ReduceMin", [pictures, axis], "min", keepdims=0)], "lowest")
    highest = build.node("ReduceMax", [pictures, axis], "max", keepdims=0)
    first = build.long(0)
    sides = [build.node("Unsqueeze", [side, first], f"side.{i}") for i, side in enumerate((lowest, highest))]
    ends = build.node("Relu", [build.node("Concat", sides, "sides", axis=0)], "ends")
    for operator, name in (("ReduceSum", "totals"), ("ReduceSumSquare", "squares"), ("ReduceMax", "peaks")):
        build.node(operator, [ends, build.long(2)], name, keepdims=0)
    build.node("Concat", [sizes[2], sizes[1]], "sizes", axis=0)
    add_outputs(graph, [f"{build.prefix}.{end}" for end in ("totals", "squares", "peaks")])
    add_outputs(graph, [f"{build.prefix}.sizes"], TensorProto.INT64)


def _upright(graph: onnx.GraphProto, value: str) -> str:
    """The matrix that was transposed to `value`, once or more, as products from the left read it, or the value: there
    are as many rows as the data has, however it is cut into batches.
    """
    node = producer(graph, value)
    if node is None or node.op_type != "Transpose":
        return value
    perm = next((list(given.ints) for given in node.attribute if given.name == "perm"), None)
    return _upright(graph, node.input[0]) if perm == [1, 0] else value
