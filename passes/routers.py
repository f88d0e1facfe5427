"""Routers of mixtures of experts, found by what becomes of their output: it says which experts run.

A router is tiny beside its experts, and its rounding error is none of degree: another expert answers. Mixtral-like toy
models lose 8 dB by 4-bit routers (9.4 against 17.5 dB), and nothing by 8 bits.
"""

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.linears import Linear

# Experts at most; a wider output is a vocabulary's.
_MOST = 1024
_SCORES = {"Softmax", "LogSoftmax", "Sigmoid", "Softplus", "Sqrt", "Tanh", "Clip", "Add", "Sub", "Div", "Where", "Cast"}
_MOVES = {"Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten"}
_PARTS = {"Gather", "Slice", "Split"}
_EXPERTS = {"MoE", "QMoE"}
_WALKED = 64


@dataclass(frozen=True)
class _Seen:
    """A value on the way. soft: behind a Softmax. apart: its columns were turned or taken apart since."""

    value: ir.Value
    soft: bool = False
    apart: bool = False


def router(linear: Linear, vocabulary: int | None) -> str:
    """Why a linear is a router, or an empty string. Its output goes through scores (Softmax, Sigmoid, Add …) into

    Case 1: TopK or ArgMax whose indices some node reads (an answer that leaves the graph routes nothing);
    Case 2: com.microsoft's MoE, as its router;
    Case 3: behind a Softmax, taken apart by column, the factors of other activations: dense experts.
    """
    if linear.shape[1] > _MOST or linear.shape[1] == vocabulary:
        return ""
    frontier = [_Seen(linear.node.outputs[0])]
    for seen in frontier:  # grows while it is walked
        for use in seen.value.uses():
            if reason := _chosen(use.node, use.idx, seen):
                return reason
            if len(frontier) < _WALKED:
                frontier += _behind(use.node, use.idx, seen)
    return ""


def _chosen(node: ir.Node, slot: int, seen: _Seen) -> str:
    if node.op_type in _EXPERTS and slot == 1:
        return f"a router of {node.op_type}"
    indices = {"TopK": 1, "ArgMax": 0}.get(node.op_type)
    if indices is not None and slot == 0 and len(node.outputs) > indices and node.outputs[indices].uses():
        return f"a router, it chooses by {node.op_type}"
    if node.op_type == "Mul" and seen.soft and seen.apart and not _by_constant(node, slot):
        return "a router, its softmax weighs experts"
    return ""


def _behind(node: ir.Node, slot: int, seen: _Seen) -> list[_Seen]:
    """What a node makes of a router's scores, if they are that still."""
    if node.domain != "":
        return []
    if node.op_type in _SCORES and (node.op_type != "Where" or slot > 0):
        return [_Seen(node.outputs[0], seen.soft or node.op_type == "Softmax", seen.apart)]
    if node.op_type == "Mul" and _by_constant(node, slot):
        return [_Seen(node.outputs[0], seen.soft, seen.apart)]
    if slot == 0 and (node.op_type in _MOVES or (node.op_type in _PARTS and _constant_operands(node))):
        return [_Seen(value, seen.soft, apart=True) for value in node.outputs]
    return [_Seen(node.outputs[0], seen.soft, seen.apart)] if node.op_type == "TopK" and slot == 0 else []


def _by_constant(node: ir.Node, slot: int) -> bool:
    other = node.inputs[1 - slot]
    return other is not None and ir.convenience.get_const_tensor(other) is not None


def _constant_operands(node: ir.Node) -> bool:
    return all(v is None or ir.convenience.get_const_tensor(v) is not None for v in node.inputs[1:])
