"""Pass kv: a decoder's caches in codes, for GroupQueryAttention or between standard operators."""

import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, Region
from qcompile.passes.caches import is_cache, is_group_query
from qcompile.passes.contract import Fact, Reads, Stage
from qcompile.passes.contrib.appended import FLOATS, Appended, Between
from qcompile.passes.contrib.codes import SCALES, CacheCodes, Floats, codes_of
from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.errors import UserError
from qcompile.passes.graph import add_initializer, small_array
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.caches import CachePeaks
from qcompile.passes.prepare.sizes import named_sizes
from qcompile.passes.spec import ActivationSpec

_GRID = ActivationSpec(ir.DataType.INT8, True)
# What else than its keys, values, lengths and tables decides what a GroupQueryAttention appends.
_TURNED = ("kv_num_heads", "do_rotary", "rotary_interleaved")


class Kv(Pass):
    """Store a decoder's caches as int8: a quarter of their memory, for long contexts; prompts are slower.

    Case 1: the keys and values that a GroupQueryAttention appends to its caches become int8 codes there, symmetric
            around zero, with the scales of what calibration saw: one for each channel of each head, or one a cache.
    Case 2: those that a Concat appends become the same codes by a QuantizeLinear before it, and floats again by a
            Cast behind it: standard operators, which decode the whole cache in every run (`appended`).
    Case 3: keys that are turned by their position: the scales hold what was seen turned by any angle (`CachePeaks`).
    Case 4: what else reads the cache that the graph gives back, as layers do that share one, reads it in floats.
    Case 5: caches that anything else reads as they are given, or gives, stay in float, with the reason. UserError where
            all would, as far as the graph tells before the walk.
    The graph's inputs and outputs for caches are int8 then, and empty ones of no length, too.
    """

    name: ClassVar[str] = "kv"
    stage: ClassVar[Stage] = Stage.BEHIND
    reads: Set[Reads] = frozenset({Reads.RANGES})
    needs: ClassVar[Set[Fact]] = frozenset({Fact.CANONICAL})
    prefers: ClassVar[Set[Fact]] = frozenset({Fact.FUSED})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.CACHES})
    takes: ClassVar[Set[Fact]] = frozenset({Fact.PARTS})

    def __init__(self, *, bits: Literal[8] = 8, scales: Literal["channel", "tensor"] = "channel") -> None:
        super().__init__()
        self.bits, self.channels = bits, scales == "channel"
        self.observers: dict[str, CachePeaks] | None = None  # by the name of the output

    def observed(self, model: ir.Model) -> dict[ir.Value, Observer]:
        """Peaks of what is appended, shown with the caches that the graph gives back.

        UserError where none can become codes.
        """
        if self.observers is None:
            watched = (own.observers for own in _tried(model))
            self.observers = {observer.value: observer for own in watched for observer in own}
        return {value: self.observers[str(value.name)] for value in model.graph.outputs if value.name in self.observers}

    def call(self, region: Region) -> None:
        """Make the caches int8, in place."""
        graph, between = region.model.graph, Between(region.model)
        told: set[ir.Value | None] = set()
        for node, own in _found(graph):
            told |= set(node.inputs)
            if isinstance(own, str):
                self.decide(node.name or "", "kept", own)
                continue
            codes = [CacheCodes.spanning(peaks, self.bits, channels=self.channels) for peaks in self._peaks(own)]
            if isinstance(own, Appended):
                between.store(own, codes[0])
            else:
                _store(own, codes, between)
            form = " by standard operators" if isinstance(own, Appended) else ""
            for coded in (node,) if isinstance(own, Appended) else own.nodes:
                self.decide(coded.name or "", "coded", f"int{self.bits} caches{form}, a scale for each {self._unit}")
        for value in graph.inputs:
            if is_cache(value) and value not in told:
                self.decide(str(value.name), "kept", f"{_readers(value)} reads it, which takes no codes")
        if between.used:
            graph.sort()

    def _peaks(self, own: "Cached | Appended") -> list[Floats]:
        """(heads, width) of each of its caches; UserError where calibration saw none."""
        known = self.observers or {}
        seen = [known[name] for name in own.presents if name in known and known[name].rows]
        if len(seen) < len(own.presents):
            raise UserError(f"kv: cache {own.presents[0]} was never seen on the calibration data: is it empty?")
        return [np.asarray(observer.expected(_GRID)[1], np.float32) for observer in seen]

    @property
    def _unit(self) -> str:
        return "channel" if self.channels else "cache"


def _found(graph: ir.Graph) -> Iterator[tuple[ir.Node, "Cached | Appended | str"]]:
    """The nodes that lengthen caches, each with what is known of these, or why they stay; of several that lengthen one
    alike, the one whose caches the graph gives back.
    """
    inputs, caches = Inputs.of(graph), {value for value in graph.inputs if is_cache(value)}
    cached = {node: Cached.of(node) for node in graph if is_group_query(node)}
    beside = {node for own in cached.values() if isinstance(own, Cached) for node in own.nodes[1:]}
    for node in list(graph):
        if node in cached and node not in beside:
            yield node, cached[node]
        elif (node.domain, node.op_type) == ("", "Concat") and node.inputs[0] in caches:
            yield node, Appended.of(node, inputs)


def _tried(model: ir.Model) -> list["Cached | Appended"]:
    """What lengthens caches of a model that can be codes; UserError where nothing does."""
    if not any(is_cache(value) for value in model.graph.inputs):
        raise UserError("kv: the model has no caches to store in codes: export it with --kv-cache, or leave kv out")
    tried = [own for _, own in _found(model.graph)]
    found = [own for own in tried if not isinstance(own, str)]
    if not found:
        told = next((own for own in tried if isinstance(own, str)), "they are lengthened unusually")
        raise UserError(f"kv: no cache of the model can become codes: {told}; leave kv out")
    return found


def _store(own: "Cached", codes: Sequence[CacheCodes], between: Between) -> None:
    """Have GroupQueryAttention store keys and values in codes; what else reads these reads them in floats."""
    for (slot, place), code, kind in zip(SCALES.items(), codes, ("k", "v"), strict=True):
        past = own.nodes[0].inputs[slot]
        assert past is not None
        floats = past.dtype or ir.DataType.FLOAT
        name = f"{own.nodes[0].outputs[slot - 2].name}.scale"
        past.type, scale = ir.TensorType(code.dtype), add_initializer(between.graph, name, ir.tensor(code.tensor))
        for node in own.nodes:
            present = node.outputs[slot - 2]
            between.decode(present, code, floats)
            present.type = past.type
            node.resize_inputs(max(SCALES.values()) + 1)
            node.replace_input_with(place, scale)
            node.attributes[f"{kind}_quant_type"] = ir.AttrString(f"{kind}_quant_type", code.per)
    for node in own.nodes:
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", codes[0].bits)


@dataclass(frozen=True, eq=False)
class Cached:
    """A GroupQueryAttention whose caches can be codes.

    nodes: it, and those of layers that share its caches: each lengthens them by the same keys and values.
    presents: names of the outputs of keys and values.
    """

    nodes: Sequence[ir.Node]
    presents: tuple[str, str]
    width: int

    @classmethod
    def of(cls, node: ir.Node) -> "Cached | str":
        """Of a node, or why its caches stay."""
        if len(node.inputs) <= max(SCALES) or len(node.outputs) < 3:
            return "it has no caches"
        for slot in SCALES:
            past, present = node.inputs[slot], node.outputs[slot - 2]
            if past is None or not past.is_graph_input() or not present.is_graph_output():
                return "its caches are no inputs and outputs of the graph"
            if codes_of(past) is not None or past.dtype not in FLOATS:
                return "its caches are no floats"
            others = [use.node for use in past.uses() if use.node is not node and use.node.op_type != "Shape"]
            foreign = [other.op_type for other in others if not _alike(node, other)]
            if foreign:
                return f"a {foreign[0]} reads its caches, too"
        key, value = (str(node.outputs[slot - 2].name) for slot in SCALES)
        width = _width(node)
        return cls([node, *others], (key, value), width) if width is not None else "how wide its heads are is not known"

    @property
    def dtype(self) -> ir.DataType | None:
        """Of the caches."""
        past = self.nodes[0].inputs[min(SCALES)]
        return past.dtype if past is not None else None

    @property
    def observers(self) -> list[CachePeaks]:
        """Of keys and of values."""
        node = self.nodes[0]
        turned = node.attributes.get_int("do_rotary", 0) == 1
        cos = node.inputs[7] if turned and len(node.inputs) > 7 else None
        pairs = _pairs(cos, self.width // 2) if cos is not None else 0
        interleaved = bool(node.attributes.get_int("rotary_interleaved", 0))
        key, value = self.presents
        turns = {key: pairs, value: 0}
        return [CachePeaks(name, self.width, own, interleaved=interleaved) for name, own in turns.items()]


def _alike(node: ir.Node, other: ir.Node) -> bool:
    """Whether another node is a GroupQueryAttention that lengthens the same caches by the same keys and values."""
    if not is_group_query(other) or node.inputs[1] is None or len(other.outputs) < 3:
        return False
    (given, told), (others, also) = (
        (own.inputs[1:10], [own.attributes.get_int(name, 0) for name in _TURNED]) for own in (node, other)
    )
    return told == also and all(a is b for a, b in itertools.zip_longest(given, others))


def _width(node: ir.Node) -> int | None:
    """Of a head: as its cache says, else as its queries do, which keys and values may lie beside."""
    past, query = node.inputs[min(SCALES)], node.inputs[0]
    width = named_sizes(past)[3] if past is not None and len(past.shape or ()) == 4 else None
    if isinstance(width, int):
        return width
    heads, groups = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    whole = named_sizes(query)[-1] if query is not None and query.shape is not None else None
    packed = node.inputs[1] is None
    return whole // (heads + 2 * groups * packed) if isinstance(whole, int) and heads else None


def _pairs(table: ir.Value, most: int) -> int:
    """How many pairs a table of cosines (positions, pairs) is for: as its shape says, or those of the rows that
    `around` puts into it; all there are, where neither is known.
    """
    own, node = named_sizes(table)[-1:], table.producer()
    parts = [value.producer() for value in node.inputs if value is not None] if node is not None else []
    shapes = [small_array(part.inputs[1]) for part in parts if part is not None and part.op_type == "Reshape"]
    told = [*own, *(int(shape[-1]) for shape in shapes if shape is not None)]
    return next((size for size in told if isinstance(size, int) and 0 < size <= most), most)


def _readers(value: ir.Value) -> str:
    return next(iter(use.node.op_type for use in value.uses() if use.node.op_type != "Shape"), "nothing")
