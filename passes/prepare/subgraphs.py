"""Weights inside of If, Loop and Scan: left as they are, and said so."""

from collections.abc import Iterable

import onnx_ir as ir

from qcompile.passes.prepare.edit import Decide

_MOVES = {"Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"}


def report_subgraphs(model: ir.Model, decide: Decide) -> None:
    """One decision for each MatMul or Gemm with a constant weight in a subgraph."""
    _report(model.graph, None, decide)


def _is_weight(value: ir.Value | None) -> bool:
    """Whether the value is a constant, or what a move or conversion makes of one."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in _MOVES else None
    return value is not None


def _report(graph: Iterable[ir.Node], owner: ir.Node | None, decide: Decide) -> None:
    for node in graph:
        is_linear = node.domain == "" and node.op_type in ("MatMul", "Gemm")
        if owner is not None and is_linear and _is_weight(node.inputs[1]):
            reason = f"inside the subgraph of {owner.op_type} node {owner.name}: left in float"
            decide(node.name or "", "skipped", reason)
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                _report(attribute.as_graph(), node, decide)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for subgraph in attribute.as_graphs():
                    _report(subgraph, node, decide)
