"""Weights that no packed product and no integer kernel takes: in bodies of If, Loop and Scan, and of recurrent nodes.

They become codes that are decoded before their reader (formats/decoded.py), whatever list of passes runs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, choose_qparams, dequantize, quantize
from qcompile.passes.formats.decoded import Coded, Decoder
from qcompile.passes.linears import Linear, as_linear, constant, dimensions, is_float_constant, vocabulary_size
from qcompile.passes.policy import Policy
from qcompile.passes.prepare.edit import Decide, add_initializer
from qcompile.passes.qdq.providers import RULES
from qcompile.passes.qdq.weights import SPEC, WeightStore, float_weight
from qcompile.passes.spec import QuantSpec
from qcompile.passes.tensors import read

RECURRENT = ("LSTM", "GRU", "RNN")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Chosen:
    """Codes for the weight of a linear, and how the report tells of them. nbytes: of codes, scales, zero points."""

    coded: Coded
    told: str
    nbytes: int


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
        coded = Coded(stored.codes, stored.scale, None, codes.axis, 0, linear.shape, codes.dequantize)
        return Chosen(coded, f"{store.grid}, weights only", stored.nbytes)

    return code


def quantize_inner(
    model: ir.Model, policy: Policy, store: WeightStore, linears: Coder, decide: Decide, *, recurrent: str = ""
) -> set[ir.Node]:
    """Quantize the weights of bodies and recurrent nodes; the nodes that a decision was made on.

    recurrent: why weights of LSTM, GRU and RNN stay in float, where they do.

    Case 1: a MatMul in a body: as `linears` codes it.
    Case 2: a Conv or ConvTranspose in a body: int8, as `store` holds it.
    Case 3: LSTM, GRU and RNN anywhere: input and recurrent weights int8, one scale for each row of each gate.
    No statistics reach into a body, and recurrent nodes see activations of their own: all is rounded to nearest.
    """
    decoder = Decoder(model)
    seen: set[ir.Node] = set()
    for node in list(model.graph.all_nodes()):
        if node.domain != "":
            continue
        inner = node.graph is not model.graph
        if node.op_type == "MatMul" and inner and not isinstance(linear := as_linear(node), str):
            _linear(linear, linears, decoder, decide)
        elif node.op_type in _CONVOLUTIONS and inner and is_float_constant(node.inputs[1]):
            _convolution(node, policy, store, decoder, decide)
        elif node.op_type in RECURRENT and recurrent:
            weights = sum(
                int(np.prod(dimensions(v))) for v in node.inputs[1:3] if v is not None and is_float_constant(v)
            )
            decide(node.name or "", "skipped", recurrent, kind=node.op_type, weights=weights)
        elif node.op_type in RECURRENT:
            _recurrent(node, policy, decoder, decide)
        else:
            continue
        seen.add(node)
    return seen


def _linear(linear: Linear, coder: Coder, decoder: Decoder, decide: Decide) -> None:
    size, name = int(np.prod(linear.shape)), str(linear.weight.name)
    chosen = coder(linear)
    if isinstance(chosen, str):
        decide(linear.name, "kept", chosen, kind="MatMul", weights=size, weight=name)
        return
    decoder.decode(linear.node, 1, chosen.coded, linear.read)
    _told(decide, linear.node, name, size, chosen.nbytes, f"{chosen.told}: in a body, rounded without data")


def _convolution(node: ir.Node, policy: Policy, store: WeightStore, decoder: Decoder, decide: Decide) -> None:
    weight, w, axis = float_weight(node, RULES[node.op_type])
    name = str(weight.name)
    if refusal := policy.refusal(node, weight):
        decide(node.name or "", "kept", refusal, kind=node.op_type, weights=w.size, weight=name)
        return
    stored = store.store(weight, w, axis)
    codes = stored.quantized
    coded = Coded(stored.codes, stored.scale, None, codes.axis, 0, w.shape, codes.dequantize)
    decoder.decode(node, 1, coded, partial(_floats, constant(weight)))
    _told(decide, node, name, w.size, stored.nbytes, f"{store.grid}, weights only: in a body")


def _recurrent(node: ir.Node, policy: Policy, decoder: Decoder, decide: Decide) -> None:
    """Case 3."""
    for slot, what in ((1, "input"), (2, "recurrent")):
        weight = node.inputs[slot] if len(node.inputs) > slot else None
        if not is_float_constant(weight):
            decide(node.name or "", "skipped", f"its {what} weights are computed", kind=node.op_type, weights=0)
            continue
        assert weight is not None
        shape, name = dimensions(weight), str(weight.name)
        size = int(np.prod(shape))
        if refusal := policy.refusal(node, weight):
            decide(node.name or "", "kept", refusal, kind=node.op_type, weights=size, weight=name)
            continue
        coded = rows_coded(decoder.model, weight)
        nbytes = constant(coded.codes).nbytes + constant(coded.scale).nbytes
        decoder.decode(node, slot, coded, partial(_floats, constant(weight)))
        _told(decide, node, name, size, nbytes, f"int8 per row, weights only: the {what} weights")


def _floats(tensor: ir.TensorProtocol) -> Array:
    return np.asarray(read(tensor), np.float32)


def rows_coded(model: ir.Model, weight: ir.Value) -> Coded:
    """int8 codes of a weight of any rank, symmetric, one scale for each row of its last axis; made once."""
    shape, dtype = dimensions(weight), constant(weight).dtype
    half = np.float16 if dtype == ir.DataType.FLOAT16 else np.float32
    spec = QuantSpec(8, SPEC.granularity, symmetric=True, signed_scale=False, scale_dtype=half)
    rows = np.asarray(read(constant(weight)), np.float32).reshape(-1, shape[-1]).T
    qparams = choose_qparams(rows, spec)
    codes = quantize(rows, qparams, spec)
    name = f"{weight.name}.int8.rows"
    known = model.graph.initializers
    if name not in known:
        add_initializer(model.graph, name, ir.tensor(np.ascontiguousarray(codes.T).reshape(shape)))
        scale = qparams.scale.reshape(*shape[:-1], 1).astype(dtype.numpy())
        add_initializer(model.graph, f"{name}.scale", ir.tensor(scale))

    def decoded() -> Array:
        return np.ascontiguousarray(dequantize(codes, qparams, spec).T).reshape(shape)

    return Coded(known[name], known[f"{name}.scale"], None, len(shape) - 1, shape[-1], shape, decoded)


def _told(decide: Decide, node: ir.Node, weight: str, size: int, nbytes: int, reason: str) -> None:
    detail = {"kind": node.op_type, "weights": size, "weight": weight, "bytes": nbytes}
    decide(node.name or "", "quantized", reason, **detail, bits_per_weight=8 * nbytes / max(size, 1))
