"""Every large float constant of a model and what reads it: the truth that coverage is measured against.

Invariant: a float constant of `least` elements or more that some node reads, in the main graph, in a body of If, Loop
or Scan or in a function, is in the census once, with the readers that compute with it. What only moves, converts or
joins constants is no reader: the census looks through it, and through an If that chooses one of several. Scales of
weights that are quantized already are none.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile.passes.bodies import bodies
from qcompile.passes.graph import MICROSOFT as _MS
from qcompile.passes.graph import is_adapter
from qcompile.passes.linears import on_a_grid

Family = Literal["MatMul", "Conv", "Gather", "other"]

LEAST = 1024
_ALL = tuple(range(64))
# By domain and operator, the inputs that are weights of products.
_PRODUCTS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("", "MatMul"): (0, 1), ("", "Gemm"): (0, 1), ("", "Einsum"): _ALL,
    ("", "LSTM"): (1, 2), ("", "GRU"): (1, 2), ("", "RNN"): (1, 2),
    (_MS, "FusedMatMul"): (0, 1), (_MS, "TransposeMatMul"): (0, 1), (_MS, "FusedMatMulActivation"): (0, 1),
    (_MS, "FusedGemm"): (0, 1), (_MS, "GemmFastGelu"): (1,), (_MS, "GemmFloat8"): (0, 1),
    (_MS, "Attention"): (1,), (_MS, "PackedAttention"): (1,), (_MS, "DecoderAttention"): (2, 3),
    (_MS, "LongformerAttention"): (1, 4), (_MS, "GatedRelativePositionBias"): (3,),
    (_MS, "MoE"): (2, 4, 6), (_MS, "AttnLSTM"): (1, 2, 5, 8, 9, 11, 12, 13),
}  # fmt: skip
_CONVOLUTIONS = {
    ("", "Conv"), ("", "ConvTranspose"), ("", "DeformConv"), (_MS, "FusedConv"), (_MS, "NhwcConv"),
    (_MS, "NhwcFusedConv"), (_MS, "ConvTransposeWithDynamicPads"),
}  # fmt: skip
_LOOKUPS = {("", "Gather"): (0,), ("", "GatherND"): (0,), (_MS, "EmbedLayerNormalization"): (2, 3, 4)}
_KNOWN_DOMAINS = {"", _MS, "ai.onnx.ml", "ai.onnx.preview.training"}
# Of these, what is read beside the first input are scales and zero points.
_GRIDS = {"QuantizeLinear", "DequantizeLinear"}
# Their float inputs are scales and biases of weights that are codes.
INTEGER_OPERATORS = {
    "MatMulNBits", "GatherBlockQuantized", "QMoE", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulBnb4", "QAttention", "QGemm", "DynamicQuantizeLSTM", "QEmbedLayerNormalization",
    "MatMulFpQ4",
}  # fmt: skip
_MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "CastLike", "Identity", "Flatten", "Slice", "Split"}
_ELEMENTWISE = {"Mul", "Div", "Add", "Sub", "Pow", "Where", "Clip"}
# What is known of a constant beside its numbers.
_FACTS = {"Shape", "Size", "ConstantOfShape", "NonZero", "ArgMax", "ArgMin", "IsNaN", "IsInf"}
_RANKS: Mapping[Family, int] = {"MatMul": 0, "Conv": 1, "Gather": 2, "other": 3}
_BY_OPERATOR: Mapping[str, Family] = {
    **{operator: "MatMul" for _, operator in _PRODUCTS}, **{operator: "Conv" for _, operator in _CONVOLUTIONS},
    **dict.fromkeys((operator for _, operator in _LOOKUPS), "Gather"),
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A node that computes with a constant. owner: the node whose body it stands in, if it does.

    position: of the input that the constant comes in by; -1 where a body of the node gives it.
    """

    node: ir.Node
    position: int
    family: Family
    owner: ir.Node | None

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name or "")


@dataclass(frozen=True)
class FloatConstant:
    """A float constant by the name of its value. family: the foremost of its readers'; readers: those of the family."""

    value: ir.Value
    size: int
    nbytes: int
    family: Family
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """Its value's name."""
        return str(self.value.name or "")


@dataclass(frozen=True)
class _Carried:
    """What a constant expression is made of: its sources that count, and its number of elements (0: unknown).

    whole: not a part that is chosen when the model runs. scaled: changed by values that are computed then (an adapter,
    a gate), which matters where a product takes it for its weight.
    """

    sources: frozenset[ir.Value]
    size: int
    whole: bool = True
    scaled: bool = False


def family_of(operator: str) -> Family:
    """The family that an operator's weights belong to; an operator's name without its domain."""
    return _BY_OPERATOR.get(operator, "other")


def census(model: ir.Model, least: int = LEAST) -> list[FloatConstant]:
    """All float constants of `least` elements or more that some node reads, in the order in which they are read."""
    found: dict[ir.Value, list[Reader]] = {}
    graphs = [model.graph, *(f.graph for f in model.functions.values() if f.domain != "qcompile")]
    for graph in graphs:
        _Reading(graph, least, found).run()
    return [_made(value, readers) for value, readers in found.items()]


def tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None of anything else, adapters among it."""
    if value.is_graph_input() and value.producer() is None and (not value.is_initializer() or is_adapter(value)):
        return None
    return value.const_value if value.const_value is not None else ir.convenience.get_const_tensor(value)


def _made(value: ir.Value, readers: Sequence[Reader]) -> FloatConstant:
    tensor, family = tensor_of(value), min((reader.family for reader in readers), key=_RANKS.__getitem__)
    assert tensor is not None
    own = tuple(dict.fromkeys(reader for reader in readers if reader.family == family))
    return FloatConstant(value, tensor.size, tensor.nbytes, family, own)


class _Reading:
    """One walk over the nodes of a graph and its bodies, in order; linear in the edges but for joins of constants."""

    def __init__(self, graph: ir.Graph, least: int, found: dict[ir.Value, list[Reader]]) -> None:
        self.graph, self.least, self.found = graph, least, found
        self.carried: dict[ir.Value, _Carried | None] = {}

    def run(self) -> None:
        self._walk(self.graph, None)

    def _walk(self, graph: ir.Graph, owner: ir.Node | None) -> None:
        """The nodes of a graph with the node whose body it is: an owner before what is in its bodies."""
        for node in graph:
            if node.op_type == "Constant" and node.domain == "":
                continue
            taken = [self._of(value) if value is not None else None for value in node.inputs]
            if not self._passed_on(node, taken):
                self._read(node, owner, taken)
                self._scaled(node, taken)
            for body in bodies(node):
                self._walk(body, node)
            self._given(node, owner)

    def _given(self, node: ir.Node, owner: ir.Node | None) -> None:
        """Constants that bodies give: an If between constants chooses one; otherwise the node is their reader."""
        given = [[self._of(value) for value in body.outputs] for body in bodies(node)]
        chosen = list(zip(*given, strict=True)) if node.op_type == "If" and len(set(map(len, given))) == 1 else []
        for output, ends in zip(node.outputs, chosen, strict=False):
            known = [own for own in ends if own is not None]
            if len(known) == len(ends):
                self.carried[output] = _Carried(frozenset().union(*(own.sources for own in known)), 0, whole=False)
        constant = [own for ends in chosen if None not in ends for own in ends]
        for own in itertools.chain(*given):
            for source in own.sources if own is not None and own not in constant else ():
                self.found.setdefault(source, []).append(Reader(node, -1, "other", owner))

    def _of(self, value: ir.Value) -> _Carried | None:
        if value not in self.carried:
            tensor = tensor_of(value)
            counts = tensor is not None and tensor.size >= self.least and tensor.dtype.is_floating_point()
            sources = frozenset([value] if counts and tensor is not None and tensor.dtype.bitwidth > 8 else ())
            self.carried[value] = None if tensor is None else _Carried(sources, tensor.size)
        return self.carried[value]

    def _passed_on(self, node: ir.Node, taken: Sequence[_Carried | None]) -> bool:
        """Whether the node's outputs are constants themselves, or a part of one that is chosen when the model runs."""
        given = [own for value, own in zip(node.inputs, taken, strict=True) if value is not None]
        known = [own for own in given if own is not None]
        self._into_scan(node, taken)
        if node.op_type in INTEGER_OPERATORS or node.domain == "qcompile" or not known or any(bodies(node)):
            return False
        if len(known) == len(given) and node.outputs:
            whole, scaled = all(own.whole for own in known), any(own.scaled for own in known)
            made = _Carried(_joined(node, known), max(own.size for own in known), whole, scaled)
        elif _chosen(node, taken) and (first := taken[0]) is not None:
            made = _Carried(first.sources, 0, whole=False, scaled=first.scaled)
        else:
            return False
        self.carried.update(dict.fromkeys(node.outputs, made))
        return True

    def _scaled(self, node: ir.Node, taken: Sequence[_Carried | None]) -> None:
        """A constant goes on through Mul, Add and the like with computed values of fewer axes, or of its own shape."""
        if node.op_type not in _ELEMENTWISE or node.domain != "":
            return
        computed = [v for v, own in zip(node.inputs, taken, strict=True) if v is not None and own is None]
        for own in (own for own in taken if own is not None and own.sources):
            shapes = [tensor.shape.numpy() for v in own.sources if (tensor := tensor_of(v)) is not None]
            if all(len(shape) > 1 and all(_fits_in(v, shape) for v in computed) for shape in shapes):
                made = _Carried(own.sources, 0, whole=False, scaled=True)
                self.carried.update(dict.fromkeys(node.outputs, made))

    def _into_scan(self, node: ir.Node, taken: Sequence[_Carried | None]) -> None:
        """A Scan gives its body a slice of each of its last inputs."""
        if node.op_type == "Scan" and "body" in node.attributes:
            count, inputs = (
                node.attributes.get_int("num_scan_inputs", 0) or 0,
                node.attributes["body"].as_graph().inputs,
            )
            for value, own in zip(reversed(inputs), list(reversed(taken))[:count], strict=False):
                if own is not None:
                    self.carried[value] = _Carried(own.sources, 0, whole=False)

    def _read(self, node: ir.Node, owner: ir.Node | None, taken: Sequence[_Carried | None]) -> None:
        if node.op_type in INTEGER_OPERATORS or node.domain == "qcompile" or node.op_type.startswith("QLinear"):
            return
        for position, own in enumerate(taken):
            if own is None or (node.op_type in _GRIDS and position):
                continue
            if node.op_type == "Gather" and node.outputs and on_a_grid(node.outputs[0]):
                continue
            compact = _compact(node.inputs[position], own)
            for source in own.sources:
                family = "other" if compact else _family(node, position, source)
                if own.scaled and (position == 0 or _RANKS[family] > _RANKS["Conv"]):
                    continue  # the node that scaled it is its reader
                self.found.setdefault(source, []).append(Reader(node, position, family, owner))


def _joined(node: ir.Node, known: Sequence[_Carried]) -> frozenset[ir.Value]:
    """What of its operands a constant expression is: not the scales of a DequantizeLinear, nor smaller factors."""
    if node.op_type in _FACTS:
        return frozenset()
    if node.op_type in _GRIDS or node.op_type in _MOVES or node.op_type == "Gather":
        return known[0].sources
    size = max(own.size for own in known)
    parts = [own for own in known if node.op_type not in _ELEMENTWISE or own.size in (0, size)]
    return parts[0].sources if len(parts) == 1 else frozenset(itertools.chain(*(own.sources for own in parts)))


def _fits_in(value: ir.Value, shape: Sequence[int]) -> bool:
    """Whether a computed value has fewer axes than a constant's shape, or as many, all of known sizes."""
    if value.shape is None or len(value.shape) > len(shape):
        return False
    return len(value.shape) < len(shape) or tuple(value.shape) == tuple(shape)


def _compact(value: ir.Value | None, own: _Carried) -> bool:
    """Whether an operand is computed from so few numbers that 4-bit codes of it would take more bytes than they do.

    A filter bank that is scattered into zeros: no format makes it smaller.
    """
    if value is None or value in own.sources or not own.whole or own.scaled or value.shape is None:
        return False
    if not value.shape.is_static():
        return False
    stored = sum(tensor.nbytes for source in own.sources if (tensor := tensor_of(source)) is not None)
    return bool(np.prod(value.shape.numpy(), dtype=np.int64) > 2 * stored)


def _chosen(node: ir.Node, taken: Sequence[_Carried | None]) -> bool:
    """Whether a node takes a part of a constant by computed bounds, one matrix of many by an index, or moves such."""
    first = taken[0] if taken else None
    if first is None or node.domain != "":
        return False
    if not first.whole:
        return node.op_type in _MOVES
    if node.op_type == "Slice":
        return True
    value = node.inputs[0]
    tensor = tensor_of(value) if value is not None else None
    rank = len(tensor.shape) if tensor is not None else 0
    return node.op_type == "Gather" and rank > 2 and node.attributes.get_int("axis", 0) == 0


def _family(node: ir.Node, position: int, source: ir.Value) -> Family:
    key = (node.domain, node.op_type)
    if position in _PRODUCTS.get(key, ()):
        return "MatMul"
    if key in _CONVOLUTIONS and position == 1:
        return "Conv"
    if position in _LOOKUPS.get(key, ()):
        return "Gather"
    tensor = tensor_of(source)
    if node.domain not in _KNOWN_DOMAINS and tensor is not None and len(tensor.shape) > 1:
        return "MatMul"  # nobody knows what it does with so many numbers; no format is for it, and that counts
    return "other"
