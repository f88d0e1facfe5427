"""Operators of ONNX Runtime's own domain that hold weights, as ONNX's operators around them.

onnxruntime.transformers and ONNX Runtime's saved graphs fuse a product with what surrounds it. Quantized, the product
is another operator anyway, so it is taken out again; ONNX Runtime fuses what is left as it likes. The forms were
compared on ONNX Runtime 1.32 (tests/passes/prepare/test_contrib.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from qcompile.passes.graph import MICROSOFT, Decide, Names, decided, float_type
from qcompile.passes.prepare.contrib_attention import take_attention_apart, take_embeddings_apart
from qcompile.passes.prepare.writer import Writer
from qcompile.passes.state import set_node

_MIN_OPSET = 13
# By fused activation: names of the attributes that its parameters become, in their order.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Elu": ("alpha",),
    "LeakyRelu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


def take_apart(model: ir.Model, decide: Decide) -> int:
    """Write fused operators with constant weights as those they were fused from.

    Case 1: FusedMatMul (TransposeMatMul of older versions) becomes MatMul, with Transpose and Mul as it needs them.
    Case 2: FusedGemm and FusedConv become Gemm and Conv, with an Add for what FusedConv sums, and their activation.
    Case 3: Attention becomes a MatMul by its packed weights, an Add, a Split and MultiHeadAttention.
    Case 4: EmbedLayerNormalization becomes a Gather for each table, Adds and a LayerNormalization.
    Forms that these operators cannot say stay, with their reason. Returns how many were taken apart.
    """
    names, fixed, changed = Names(model), decided(model), 0
    for node in list(model.graph.all_nodes()):
        rule = _RULES.get(node.op_type) if node.domain == MICROSOFT else None
        if rule is None or model.opset_imports.get("", 0) < _MIN_OPSET:
            continue
        weights = [value for value in node.inputs if value in fixed and value is not None]
        if not weights or fixed.issuperset(node.inputs):
            continue
        reason = rule(node, names, model.graph, fixed)
        if reason:
            left = f"{node.op_type} cannot be taken apart: {reason}"
            set_node(node, left=left)
            decide(node.name or "", "skipped", left)
        else:
            changed += 1
            decide(node.name or "", "split", f"{node.op_type} taken apart, so that its weights are of their own")
    return changed


_Rule = Callable[[ir.Node, Names, ir.Graph, set[ir.Value]], str]


def _fused_matmul(node: ir.Node, names: Names, home: ir.Graph, fixed: set[ir.Value]) -> str:
    """Case 1."""
    operands: list[ir.Value] = [value for value in node.inputs if value is not None]
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        return "it turns its batch axes round"
    ranks = [None if value.shape is None else len(value.shape) for value in operands]
    flips = [bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB")]
    if any(flip and rank is None for flip, rank in zip(flips, ranks, strict=True)):
        return "the rank of an operand that it transposes is unknown"
    alpha = node.attributes.get_float("alpha", 1.0) or 0.0
    weight = 1 if operands[1] in fixed else 0
    alone = len(operands[weight].uses()) == 1 and operands[weight].is_initializer()
    write = Writer(node, names, home)
    for i, (flip, rank) in enumerate(zip(flips, ranks, strict=True)):
        if flip and rank is not None and rank > 1:
            order = [*range(rank - 2), rank - 1, rank - 2]
            operands[i] = write.transpose(operands[i], order, f"{'input' if i != weight else 'weight'}_transposed")
    scale = None if alpha == 1 else write.constant(alpha, "alpha", _numpy(operands[weight], write.node))
    if scale is not None and alone:
        operands[weight], scale = (
            write.op("Mul", [operands[weight], scale], "weight_scaled", like=operands[weight]),
            None,
        )
    result = write.op("MatMul", operands)
    write.end(result if scale is None else write.op("Mul", [result, scale], "scaled"))
    return ""


def _numpy(value: ir.Value, node: ir.Node) -> Any:
    return (value.dtype or float_type(node)).numpy()


def _fused_gemm(node: ir.Node, names: Names, home: ir.Graph, fixed: set[ir.Value]) -> str:
    """Case 2."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    told = {name: attributes.pop(name) for name in list(attributes) if name.startswith("activation")}
    activation = str(told.pop("activation", ""))
    parameters = [float(told[f"activation_{name}"]) for name in ("alpha", "beta") if f"activation_{name}" in told]
    if activation not in _ACTIVATIONS or len(parameters) < len(_ACTIVATIONS[activation]):
        return f"its activation is {activation or 'not told'}"
    write = Writer(node, names, home)
    write.end(_activated(write, write.op("Gemm", node.inputs, "", attributes), activation, parameters))
    return ""


def _fused_conv(node: ir.Node, names: Names, home: ir.Graph, fixed: set[ir.Value]) -> str:
    """Case 2."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    activation = str(attributes.pop("activation", ""))
    parameters = [float(number) for number in attributes.pop("activation_params", ())]
    wanted = 2 if activation == "Clip" else len(_ACTIVATIONS.get(activation, ()))
    if activation not in (*_ACTIVATIONS, "Clip", "") or len(parameters) < wanted:
        return f"its activation is {activation}"
    write = Writer(node, names, home)
    operands = list(node.inputs[:3])
    while operands[-1] is None:
        operands.pop()
    result = write.op("Conv", operands, "", attributes)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        result = write.op("Add", [result, node.inputs[3]], "sum")
    write.end(_activated(write, result, activation, parameters))
    return ""


def _activated(write: Writer, value: ir.Value, activation: str, parameters: list[float]) -> ir.Value:
    if not activation:
        return value
    if activation == "Clip":
        kind = _numpy(write.node.outputs[0], write.node)
        bounds = [write.constant(bound, f"clip_{i}", kind) for i, bound in enumerate(parameters[:2])]
        return write.op("Clip", [value, *bounds], "clip")
    named = dict(zip(_ACTIVATIONS[activation], parameters, strict=False))
    return write.op(activation, [value], activation.lower(), named)


_RULES: Mapping[str, _Rule] = {
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "FusedConv": _fused_conv,
    "Attention": take_attention_apart,
    "EmbedLayerNormalization": take_embeddings_apart,
}
