"""Room for rows to come: how far the extremes of many rows reach beyond those of the few that were seen."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.observers.builder import Builder
from qcompile.passes.observers.nodes import add_outputs, constant, floats, producer

Sums = npt.NDArray[np.float64]
Ends = npt.NDArray[np.floating]

# Groups up to which a choice to clip must show that enough of them tell of it, and from which on it is taken as made.
_FEW, _ENOUGH = 64, 128
# How many groups must tell what a clip costs: below the first it does not count, from the second on it does.
_UNKNOWN, _KNOWN = 0.75, 1.5
# What is taken to be known of groups' extremes before any: their spread relative to the largest, as so many groups.
_SPREAD, _PRIOR = 0.15, 2
# The scale of a Gumbel distribution relative to its standard deviation; its quantiles at scale 1, evenly spread.
_GUMBEL = math.sqrt(6) / math.pi
_QUANTILES = -np.log(-np.log((np.arange(256) + 0.5) / 256))
# Steps of a grid on each side of zero; and rows to come of which one may go beyond the room that is given at most: who
# has seen as many needs none.
_STEPS, _RARE = 127, 1024


@dataclass
class RowExtremes:
    """How the extremes of groups of numbers vary that were drawn independently of each other.

    A group is what has a place of its own: a token, a line of a matrix; of what a convolution reads or gives, and
    of any value of rank 4 and more, a whole picture: its positions share what is particular to it, and are no sample by
    themselves.
    rows: the positions of all groups (a token is one). numbers: in all groups. sums: float64 (2, 2), of the magnitudes
    of the groups' lowest numbers (below zero) and highest ones (above), and of their squares.
    """

    rows: int = 0
    numbers: int = 0
    groups: int = 0
    sums: Sums | None = None

    @classmethod
    def of(cls, matrix: Array) -> "RowExtremes":
        """Those of a matrix (n, K)."""
        found = cls()
        found.add(np.stack([-matrix.min(axis=1), matrix.max(axis=1)]).clip(0), 1, matrix.shape[1])
        return found

    def add(self, peaks: Ends, positions: int, width: int) -> None:
        """Magnitudes of the low and high ends of groups, (2, groups); positions in each, numbers in each position."""
        most = np.asarray(peaks, np.float64)
        own = np.stack([most.sum(axis=1), (most**2).sum(axis=1)], axis=1)
        self.sums = own if self.sums is None else self.sums + own
        self.groups += most.shape[1]
        self.rows += positions * most.shape[1]
        self.numbers += positions * most.shape[1] * width

    def standing_for(self, rows: int) -> "RowExtremes":
        """The same as that of so many rows, of which these are a fair sample."""
        share = rows / max(self.rows, 1)
        groups, sums = round(share * self.groups), None if self.sums is None else share * self.sums
        return RowExtremes(rows, round(share * self.numbers), groups, sums)

    @property
    def enough(self) -> float:
        """0 … 1: whether there are groups enough to take an observer's choice as it is, whatever they say of it."""
        return min(1.0, max(0.0, (self.groups - _FEW) / (_ENOUGH - _FEW)))

    def telling(self, end: int, bound: float, extreme: float) -> float:
        """How many pictures tell what cutting off beyond a bound costs, where `extreme` is the largest magnitude.

        The cost is a sum over pictures, of each as the square of what lies beyond; where a few have most of it, it is
        known from as many only: (Σ c)² / Σ c², Kish's effective size. Extremes have a Gumbel distribution. Tokens tell
        nothing before there are `enough`: a few mean a single text, whose tokens are not independent.
        """
        scale = self.scale(end, extreme)
        if not scale > 0 or self.sums is None or self.groups == self.rows:
            return 0.0
        location = self.sums[end, 0] / self.groups - np.euler_gamma * scale
        costs = np.square(np.maximum(location + scale * _QUANTILES - bound, 0) / scale)
        total = float(np.square(costs).sum())
        return self.groups * float(costs.mean()) * float(costs.sum()) / total if total > 0 else 0.0

    def widened(self, chosen: tuple[float, float], extremes: tuple[float, float]) -> tuple[float, float]:
        """The range `chosen` within the `extremes` (low, high), for rows to come.

        Case 1: too few groups tell what a range within the extremes cuts off: it is the extremes; as they become
                `enough`, or what it costs comes to be known, it goes over to the one that was chosen.
        Case 2: few groups have not shown the extremes either: both ends get `room`, less of it the more pictures tell
                what lies beyond them. Ends that lie at zero stay there.
        """
        if self.sums is None or not self.groups:
            return chosen
        most = (max(-extremes[0], 0.0), max(extremes[1], 0.0))
        ends = []
        for end, own, extreme in zip(range(2), (-chosen[0], chosen[1]), most, strict=True):
            telling = self.telling(end, own, extreme)
            known = min(1.0, max(0.0, (telling - _UNKNOWN) / (_KNOWN - _UNKNOWN)))
            settled = extreme + max(known, self.enough) * (own - extreme)
            ends.append(settled + self.room(end, extreme) / (1 + telling))
        return -ends[0], ends[1]

    def room(self, end: int, extreme: float) -> float:
        """How far beyond its extreme an end (0 low, 1 high) lies where rounding and cutting off cost least together.

        Of groups to come, one in groups + 1 goes beyond the extreme, by a number that is exponential with scale s,
        whatever the tail of the usual kinds (Gumbel); with it go k numbers, which is taken to be the square root of its
        positions: between its largest alone and all. With room r that costs 2 k s² exp(-r / s) / (groups + 1) a group,
        and rounding its m numbers m ((extreme + r) / 127)² / 12: many numbers want a fine grid, and a few a wide one.
        At most the room that one in `_RARE` rows goes beyond.
        """
        scale, together = self.scale(end, extreme), math.sqrt(self.rows / max(self.groups, 1))
        known = self.groups * together
        if not scale > 0 or known >= _RARE:
            return 0.0
        width = self.numbers / self.groups
        low, high = 0.0, math.log(_RARE / known) * scale
        for _ in range(40):  # where the derivative of the cost, which rises, goes through zero
            room = (low + high) / 2
            rounding = width * (extreme + room) / (6 * (2 * _STEPS) ** 2)
            clipping = 2 * scale * together * self.beyond(room, scale)
            low, high = (low, room) if rounding > clipping else (room, high)
        return high

    def beyond(self, room: float, scale: float) -> float:
        """The share of groups to come that go beyond an extreme with so much room."""
        return math.exp(-room / scale) / (self.groups + 1)

    def scale(self, end: int, extreme: float) -> float:
        """The scale of the Gumbel distribution that groups' extremes at an end have, where `extreme` is the largest
        magnitude: about as far beyond a bound lies what goes beyond it.
        """
        if not extreme > 0 or self.sums is None:
            return 0.0
        total, squares = self.sums[end]
        known = _PRIOR * (_SPREAD * extreme) ** 2
        variance = (max(squares - total**2 / self.groups, 0.0) + known) / (self.groups - 1 + _PRIOR)
        return _GUMBEL * math.sqrt(variance)


def append_row_extremes(graph: onnx.GraphProto, value: str, *, pictures: int = 4) -> None:
    """Append what `RowExtremes.add` takes in as outputs: `value`.row.peaks, float32 (2, groups), and `value`.row.sizes,
    int64 (2,). pictures: the rank from which on the value is pictures and not tokens.
    """
    build, value = Builder(graph, f"{value}.row"), _upright(graph, value)
    one = build.long(1)
    shape = build.node("Shape", [value], "shape")
    rank = build.node("Size", [shape], "rank")
    few = build.node("Less", [rank, build.node("Squeeze", [build.long(pictures)], "pictures")], "few")
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
    groups = build.node("Reshape", [floats(graph, value), three], "by.group", allowzero=1)
    axes = constant(graph, "qcompile.axes12", [1, 2])
    lowest = build.node("Neg", [build.node("ReduceMin", [groups, axes], "min", keepdims=0)], "lowest")
    highest = build.node("ReduceMax", [groups, axes], "max", keepdims=0)
    first = build.long(0)
    sides = [build.node("Unsqueeze", [side, first], f"side.{i}") for i, side in enumerate((lowest, highest))]
    peaks = build.node("Relu", [build.node("Concat", sides, "sides", axis=0)], "peaks")
    add_outputs(graph, [peaks])
    add_outputs(graph, [build.node("Concat", [sizes[2], sizes[1]], "sizes", axis=0)], TensorProto.INT64)


def _upright(graph: onnx.GraphProto, value: str) -> str:
    """The matrix that was transposed to `value`, once or more, as products from the left read it, or the value: there
    are as many rows as the data has, however it is cut into batches.
    """
    node = producer(graph, value)
    if node is None or node.op_type != "Transpose":
        return value
    perm = next((list(given.ints) for given in node.attribute if given.name == "perm"), None)
    return _upright(graph, node.input[0]) if perm == [1, 0] else value
