"""Cutting a graph where few values, at best one residual stream, carry everything forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompile.compiler.walk.extract import reads
from qcompile.passes.linears import find_linears
from qcompile.passes.qdq.selection import weight_position

# Constants of at least this many bytes make what reads them part of the stream.
_LARGE = 1 << 14
# Weights of a segment, in bytes, above which it is cut where more than one value goes on; and how many times as large
# as its largest weight it must be, so that the projections of one layer stay together.
_GIANT, _WEIGHTS = 1 << 28, 8
# Segments of small weights, in bytes, are joined to this many: each has sessions of its own, which take milliseconds.
# But no more targets are in one than ONNX Runtime makes a session for in linear time, probes and observers with it.
_SEGMENTS, _SMALL, _MOST = 256, 1 << 20, 32
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph.

    carried: the values that enter from the segments before (none for the first). carry: those that go on to later ones
    (none for the last); one that only passes through is among both. What depends on no large weight (masks, rotary
    tables, what is computed of a graph input), or on constants alone (a weight's Transpose), belongs to no segment:
    each piece that needs it computes it again.
    light: graph outputs that are such values; the last segment gives them.
    """

    nodes: list[ir.Node]
    carried: tuple[ir.Value, ...] = ()
    carry: tuple[ir.Value, ...] = ()
    light: tuple[ir.Value, ...] = ()

    @property
    def made(self) -> list[ir.Value]:
        """The values that it gives to later segments and that do not only pass through."""
        return [value for value in self.carry if value not in self.carried]


def targets(model: ir.Model) -> set[ir.Node]:
    """What segments are made around: the linears, and convolutions, too, where products are more than `_SEGMENTS`: the
    time that ONNX Runtime takes for a session of thousands, and their observers, is not linear.
    """
    linears = {linear.node for linear in find_linears(model.graph)}
    weighted = {node for node in model.graph if weight_position(node) is not None}
    return linears | weighted if len(weighted) > _SEGMENTS else linears


def split(model: ir.Model, is_target: Callable[[ir.Node], bool]) -> list[Segment]:
    """The model's segments, each with at least one target node; a graph without any is one segment.

    Wherever it is cut, every value computed so far that a later node, or the float twin of one, reads is carried. So
    what a segment reads is computed inside it, carried, or follows from graph inputs without large weights.
    A cut never lies
    - between a Q or a DQ and its reader;
    - between targets that share a weight: it is rounded once, for all of them;
    - where a value would be carried that is no tensor of known type.
    Case 1: where one value goes on.
    Case 2: before a node that reads all the values that go on, for the last time, and gives several of its own: a
            normalization that adds the residual stream and hands it on.
    Case 3: within a segment of very large weights, where the fewest values go on.
    The time is linear in the nodes, but for Case 3: times the logarithm of the number of such segments.
    """
    heavy = _downstream(model, is_target)
    if not heavy:
        return [Segment(list(model.graph))]
    line = _Line.of(heavy, is_target)
    cuts = [*line.narrow(), len(heavy) - 1]
    starts = [0, *(cut + 1 for cut in cuts[:-1])]
    inner = [cut for start, end in zip(starts, cuts, strict=True) for cut in line.halves(start, end)]  # Case 3
    found = list(line.segments(sorted({*cuts, *inner})))
    inside = set(heavy)
    light = [value for value in model.graph.outputs if value.producer() is not None and value.producer() not in inside]
    return [*found[:-1], replace(found[-1], light=tuple(light))]


@dataclass
class _Line:
    """The nodes in the graph's order, with what crosses the place behind each.

    ending: the values whose last reader a node is. targets: the number of targets before each node, and in all.
    width: how many values go on; forbidden: whether the place is none to cut at. size: bytes of the weights that are
    read first there; largest: of the largest one.
    """

    nodes: Sequence[ir.Node]
    ending: list[list[ir.Value]]
    targets: list[int] = field(default_factory=lambda: [0])
    width: list[int] = field(default_factory=list)
    forbidden: list[bool] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, nodes: Sequence[ir.Node], is_target: Callable[[ir.Node], bool]) -> "_Line":
        made = {value for node in nodes for value in node.outputs}
        last: dict[ir.Value, int] = {}
        shared: dict[ir.Value, int] = {}
        for i, node in enumerate(nodes):
            last.update((value, i) for value in reads(node) if value in made)
            shared.update((weight, i) for weight in _weights(node) if is_target(node))
        line = cls(nodes, [[] for _ in nodes])
        for value, i in last.items():
            line.ending[i].append(value)
        line._sweep(is_target, last, shared)
        return line

    def _sweep(
        self, is_target: Callable[[ir.Node], bool], last: dict[ir.Value, int], shared: dict[ir.Value, int]
    ) -> None:
        width = bad = until = 0
        seen: set[ir.Value] = set()
        for i, node in enumerate(self.nodes):
            begun = [value for value in node.outputs if last.get(value, i) > i]
            width += len(begun) - len(self.ending[i])
            bad += sum(not _carriable(v) for v in begun) - sum(not _carriable(v) for v in self.ending[i])
            weights = [value for value in reads(node) if is_large(value) and value not in seen]
            seen.update(weights)
            sizes = [value.const_value.nbytes for value in dict.fromkeys(weights) if value.const_value is not None]
            if is_target(node):
                until = max(until, *(shared[weight] for weight in _weights(node)), i)
            self.targets.append(self.targets[-1] + is_target(node))
            self.width.append(width)
            self.forbidden.append(bad > 0 or until > i)
            self.size.append(sum(sizes))
            self.largest.append(max(sizes, default=0))

    def narrow(self) -> list[int]:
        """The places of Cases 1 and 2, with targets on both sides of each."""
        most, cuts, start, size = self.targets[-1], [], 0, 0
        least = min(-(-most // _SEGMENTS), _MOST)
        for i in range(len(self.nodes) - 1):
            size += self.size[i]
            held = self.targets[i + 1] - self.targets[start]
            enough = held >= (1 if size >= _SMALL else least) and self.targets[i + 1] < most
            if enough and not self.forbidden[i] and (self.width[i] == 1 or self._all_meet(i)):
                cuts.append(i)
                start, size = i + 1, 0
        return cuts

    def _all_meet(self, i: int) -> bool:
        """Case 2."""
        after = self.width[i + 1] - self.width[i] + len(self.ending[i + 1])
        return 0 < self.width[i] == len(self.ending[i + 1]) and after > 1

    def halves(self, start: int, end: int) -> Iterator[int]:
        """Case 3: places within start … end, the narrowest first, until no part is giant."""
        parts = [(start, end)]
        while parts:
            start, end = parts.pop()
            sizes = self.size[start : end + 1]
            whole = sum(sizes)
            if whole <= max(_GIANT, _WEIGHTS * max(self.largest[start : end + 1])):
                continue
            before, found = 0, []
            for i in range(start, end):
                before += self.size[i]
                sides = self.targets[i + 1] > self.targets[start] and self.targets[end + 1] > self.targets[i + 1]
                if sides and not self.forbidden[i] and whole / 4 <= before <= 3 * whole / 4:
                    found.append((self.width[i], abs(2 * before - whole), i))
            if found:
                cut = min(found)[2]
                yield cut
                parts += [(start, cut), (cut + 1, end)]

    def segments(self, cuts: Sequence[int]) -> Iterator[Segment]:
        """The segments that end at the cuts."""
        ends, start, carried = set(cuts), 0, tuple[ir.Value, ...]()
        live: dict[ir.Value, None] = {}
        last = {value: i for i, values in enumerate(self.ending) for value in values}
        for i, node in enumerate(self.nodes):
            live.update((value, None) for value in node.outputs if last.get(value, i) > i)
            for value in self.ending[i]:
                live.pop(value, None)
            if i in ends:
                carry = tuple(live)
                yield Segment(list(self.nodes[start : i + 1]), carried, carry)
                start, carried = i + 1, carry


def _carriable(value: ir.Value) -> bool:
    """Whether a value may go from one segment to another."""
    producer = value.producer()
    rounding = producer is not None and producer.op_type in _ROUNDING
    return isinstance(value.type, ir.TensorType) and not rounding


def is_large(value: ir.Value) -> bool:
    """Whether the value is a constant of rank 2 or more that makes what reads it part of the stream."""
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) > 1 and tensor.nbytes >= _LARGE


def _weights(node: ir.Node) -> Iterator[ir.Value]:
    """The large constants that a node reads, through a Transpose, too."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
        if source is not None and is_large(source):
            yield source


def _downstream(model: ir.Model, is_target: Callable[[ir.Node], bool]) -> list[ir.Node]:
    """Nodes that read a large weight and everything that depends on them, in the graph's order.

    What is computed of constants alone is a weight itself, however far apart its readers are: a table's Transpose that
    the head reads, too, would go through all segments.
    """
    reached, weights = set[ir.Value](), set[ir.Value]()
    nodes = []
    for node in model.graph:
        read = list(reads(node))
        if not is_target(node) and not any(value in reached or value in weights or is_large(value) for value in read):
            continue
        if not is_target(node) and node.op_type not in _ROUNDING and all(_constant(v) or v in weights for v in read):
            weights.update(node.outputs)
        else:
            nodes.append(node)
            reached.update(node.outputs)
    return nodes


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.is_initializer()
