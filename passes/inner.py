"""Weights that no packed product and no integer kernel takes: in bodies of If, Loop and Scan, of recurrent nodes, and
tables of experts.

They become codes that are decoded before their reader (formats/decoded.py), whatever list of passes runs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.base import Reason
from qcompile.passes.formats.decoded import Coded, Decoder
from qcompile.passes.formats.rows import coded, replace_lookup
from qcompile.passes.graph import MICROSOFT, Decide
from qcompile.passes.linears import (
    CONVOLUTIONS,
    Linear,
    as_linear,
    constant,
    dimensions,
    is_float_constant,
    vocabulary_size,
)
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.providers import RULES
from qcompile.passes.qdq.weights import SPEC, WeightStore, float_weight
from qcompile.passes.spec import QuantSpec, integers
from qcompile.passes.tensors import read

RECURRENT = ("LSTM", "GRU", "RNN")
EIGHT = QuantSpec(8, SPEC.granularity, symmetric=True, signed_scale=False)
_MOVES = ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Split", "Slice")
_PER_ROW = "int8 per row, weights only"
# Elements from which a constant is a weight.
_LEAST = 1024


@dataclass(frozen=True)
class Chosen:
    """Codes for the weight of a linear, and how the report tells of them.

    nbytes: of codes, scales, zero points. format: the name of their weight format.
    """

    coded: Coded
    told: str
    nbytes: int
    format: str


class Coder(Protocol):
    """Stores the weight of a linear in a body as codes, or says why it stays in float."""

    def __call__(self, linear: Linear) -> Chosen | str:
        """The codes, equal ones once."""


def int8(model: ir.Model, policy: Policy, store: WeightStore) -> Coder:
    """Codes as `store` holds them, for every linear that the policy does not keep in float."""
    vocabulary = vocabulary_size(model)

    def code(linear: Linear) -> Chosen | str:
        spec = policy.for_linear(linear, vocabulary)
        if isinstance(spec, str):
            return spec
        stored = store.store(linear.weight, linear.read(), 1, transposed=linear.transposed)
        codes = stored.quantized
        whole = Coded(stored.codes, stored.scale, None, codes.axis, 0, linear.shape, codes.dequantize)
        return Chosen(whole, f"{store.grid}, weights only", stored.nbytes, SPEC.format)

    return code


def quantize_inner(
    model: ir.Model, policy: Policy, store: WeightStore, linears: Coder, decide: Decide, *, runtime: str = ""
) -> set[ir.Node]:
    """Quantize the weights of bodies and recurrent nodes; the nodes that a decision was made on.

    runtime: one that decodes no weights but those of Cases 1 and 2, so that all others stay in float.

    Case 1: a MatMul in a body: as `linears` codes it.
    Case 2: a Conv or ConvTranspose in a body: int8, as `store` holds it.
    Case 3: LSTM, GRU and RNN anywhere: input and recurrent weights int8, one scale for each row of each gate.
    Case 4: a MatMul with a constant of rank 3 and more that `prepare` did not take apart: int8, a scale a row.
    Case 5: matrices of experts that a Gather with computed indices takes: codes are looked up, and decoded behind.
    Case 6: MoE of com.microsoft: its tables are decoded before it. (QMoE of ONNX Runtime 1.32 weights experts in
            another way on the CPU: 10 dB from what its own codes say.)
    No statistics reach into a body, and recurrent nodes and experts see activations of their own: all is rounded to
    nearest. float64 stays: DequantizeLinear does not give it.
    """
    decoder = Decoder(model)
    seen: set[ir.Node] = set()
    for node in list(model.graph.all_nodes()):
        inner, plain = node.graph is not model.graph, node.domain == ""
        if plain and node.op_type == "MatMul" and inner and not isinstance(linear := as_linear(node), str):
            _linear(linear, linears, decoder, decide)
        elif plain and node.op_type in CONVOLUTIONS and inner and is_float_constant(node.inputs[1]):
            _convolution(node, policy, store, decoder, decide)
        elif runtime and (slots := _decodable(node)):
            for table in (node.inputs[slot] for slot in slots if slot < len(node.inputs)):
                if table is not None and is_float_constant(table):
                    _left(decide, node, table, f"{runtime} decodes no weights of {node.op_type} nodes like this")
        elif plain and node.op_type in RECURRENT:
            for slot, what in ((1, "input"), (2, "recurrent")):
                _decoded(node, slot, EIGHT, Reason(_PER_ROW, f"{what} weights"), policy, decoder, decide)
        elif plain and node.op_type == "MatMul" and (deep := _deep(node)) is not None:
            _decoded(node, deep, EIGHT, Reason(_PER_ROW, "several matrices"), policy, decoder, decide)
        elif plain and is_lookup(node):
            _lookup(model, node, policy, decide)
        elif (node.domain, node.op_type) == (MICROSOFT, "MoE"):
            for slot in (2, 4, 6):
                experts = _plain(policy, node, node.inputs[slot] if slot < len(node.inputs) else None)
                _decoded(node, slot, experts, Reason(f"{experts}, weights only", "experts"), policy, decoder, decide)
        else:
            continue
        seen.add(node)
    return seen


def _plain(policy: Policy, node: ir.Node, table: ir.Value | None) -> QuantSpec:
    """The grid of matrices of experts."""
    return integers(policy.of(node, table) or policy.body)


def _decodable(node: ir.Node) -> tuple[int, ...]:
    """The inputs that may be weights of Cases 3 to 6; none of other nodes."""
    if (node.domain, node.op_type) == (MICROSOFT, "MoE"):
        return (2, 4, 6)
    if node.domain == "" and node.op_type in RECURRENT:
        return (1, 2)
    deep = _deep(node) if (node.domain, node.op_type) == ("", "MatMul") else None
    return (0,) if is_lookup(node) else () if deep is None else (deep,)


def _linear(linear: Linear, coder: Coder, decoder: Decoder, decide: Decide) -> None:
    size, name = int(np.prod(linear.shape)), str(linear.weight.name)
    chosen = coder(linear)
    if isinstance(chosen, str):
        decide(linear.name, "kept", chosen, kind="MatMul", weights=size, weight=name)
        return
    decoder.decode(linear.node, 1, chosen.coded, linear.read)
    told = Reason(chosen.told, "in a body, rounded without data")
    _told(decide, linear.node, name, size, chosen.nbytes, told, chosen.format)


def _convolution(node: ir.Node, policy: Policy, store: WeightStore, decoder: Decoder, decide: Decide) -> None:
    weight, w, axis = float_weight(node, RULES[node.op_type])
    name = str(weight.name)
    if refusal := policy.refusal(node, weight):
        decide(node.name or "", "kept", refusal, kind=node.op_type, weights=w.size, weight=name)
        return
    stored = store.store(weight, w, axis)
    codes = stored.quantized
    whole = Coded(stored.codes, stored.scale, None, codes.axis, 0, w.shape, codes.dequantize)
    decoder.decode(node, 1, whole, partial(_floats, constant(weight)))
    _told(decide, node, name, w.size, stored.nbytes, Reason(f"{store.grid}, weights only", "in a body"), SPEC.format)


def _decoded(
    node: ir.Node, slot: int, spec: QuantSpec, told: Reason, policy: Policy, decoder: Decoder, decide: Decide
) -> None:
    """Cases 3, 4 and 6: one weight of a node, whole, behind a DequantizeLinear."""
    weight = node.inputs[slot] if len(node.inputs) > slot else None
    if weight is None:
        return
    if not is_float_constant(weight):
        decide(node.name or "", "skipped", f"its input {slot} is computed", kind=node.op_type, weights=0)
    elif refusal := policy.refusal(node, weight):
        _left(decide, node, weight, refusal, action="kept")
    elif constant(weight).dtype == ir.DataType.DOUBLE:
        _left(decide, node, weight, "DequantizeLinear does not give float64")
    else:
        codes = coded(decoder.model, weight, spec)
        parts = (codes.codes, codes.scale, codes.zero_point)
        nbytes = sum(constant(value).nbytes for value in parts if value is not None)
        name, size = str(weight.name), int(np.prod(dimensions(weight)))
        decoder.decode(node, slot, codes, partial(_floats, constant(weight)))
        _told(decide, node, name, size, nbytes, told, spec.format)


def _lookup(model: ir.Model, node: ir.Node, policy: Policy, decide: Decide) -> None:
    """Case 5."""
    table = node.inputs[0]
    assert table is not None
    name, size = str(table.name), int(np.prod(dimensions(table)))
    if refusal := policy.refusal(node, table):
        _left(decide, node, table, refusal, action="kept")
    elif constant(table).dtype == ir.DataType.DOUBLE:
        _left(decide, node, table, "DequantizeLinear does not give float64")
    else:
        kind = node.op_type
        plain = _plain(policy, node, table)
        nbytes = replace_lookup(model, node, plain)
        told = Reason(f"{plain}, weights only", "experts by index")
        _told(decide, node, name, size, nbytes, told, plain.format, kind=kind)


def is_lookup(node: ir.Node) -> bool:
    """Whether a node takes matrices out of a constant table (E, …) by computed indices, for a product."""
    if (node.op_type, node.domain) != ("Gather", "") or node.attributes.get_int("axis", 0) != 0:
        return False
    table, indices = node.inputs[0], node.inputs[1]
    if table is None or indices is None or indices.const_value is not None or not is_float_constant(table):
        return False
    return len(dimensions(table)) > 2 and _feeds_product(node.outputs[0])


def _feeds_product(value: ir.Value) -> bool:
    frontier = [value]
    for current in frontier:  # grows while it is walked
        for use in current.uses():
            if use.node.op_type in ("MatMul", "Gemm", "Einsum"):
                return True
            if use.node.op_type in _MOVES and use.idx == 0 and len(frontier) < 32:
                frontier += use.node.outputs
    return False


def _deep(node: ir.Node) -> int | None:
    """The operand of a MatMul that is a constant of rank 3 and more, large enough to matter."""
    for slot in (1, 0):
        value = node.inputs[slot]
        if value is not None and is_float_constant(value):
            shape = dimensions(value)
            return slot if len(shape) > 2 and np.prod(shape) >= _LEAST else None
    return None


def _floats(tensor: ir.TensorProtocol) -> Array:
    return np.asarray(read(tensor), np.float32)


def _left(decide: Decide, node: ir.Node, weight: ir.Value, reason: str, *, action: str = "skipped") -> None:
    size = int(np.prod(dimensions(weight)))
    decide(node.name or "", action, reason, kind=node.op_type, weights=size, weight=str(weight.name))


def _told(
    decide: Decide,
    node: ir.Node,
    weight: str,
    size: int,
    nbytes: int,
    reason: Reason,
    format: str,
    *,
    kind: str | None = None,
) -> None:
    detail = {"kind": kind or node.op_type, "weights": size, "weight": weight, "bytes": nbytes}
    bits = 8 * nbytes / max(size, 1)
    decide(node.name or "", "quantized", reason, format=format, **detail, bits_per_weight=bits)
