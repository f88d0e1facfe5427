"""Cutting a graph where one value, the residual stream, carries everything forward."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.compiler.extract import captured

# Constants of at least this many bytes make what reads them part of the stream.
_LARGE = 1 << 14


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph.

    carried: the value that enters from the segment before (None for the first). carry: the value that goes on to the
    next one (None for the last). What depends on no large weight (masks, rotary tables) belongs to no segment: each
    piece that needs it computes it again.
    """

    nodes: list[ir.Node]
    carried: ir.Value | None
    carry: ir.Value | None


def split(model: ir.Model, is_target: Callable[[ir.Node], bool]) -> list[Segment]:
    """The model's segments, each with at least one target node; a graph without any is one segment.

    Nodes are cut apart where exactly one value computed so far is read later. A Q and its DQ stay with what reads them.
    """
    heavy = _downstream(model, is_target)
    index = {node: i for i, node in enumerate(heavy)}
    last_use = {
        value: max((index[reader] for reader in _readers(value) if reader in index), default=-1)
        for node in heavy
        for value in node.outputs
    }
    last_target = max((i for i, node in enumerate(heavy) if is_target(node)), default=-1)
    segments: list[Segment] = []
    start, carried, has_target = 0, None, False
    live: set[ir.Value] = set()
    for i, node in enumerate(heavy):
        has_target = has_target or is_target(node)
        live.update(value for value in node.outputs if last_use[value] > i)
        live = {value for value in live if last_use[value] > i}
        if has_target and i < last_target and len(live) == 1 and not _rounding(node):
            (carry,) = live
            segments.append(Segment(heavy[start : i + 1], carried, carry))
            start, carried, has_target = i + 1, carry, False
    if start < len(heavy) or not segments:
        segments.append(Segment(heavy[start:] or list(model.graph), carried, None))
    return segments


def _rounding(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) > 1 and tensor.nbytes >= _LARGE


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes of the main graph that read the value, directly or inside a subgraph of theirs."""
    return [_outermost(use.node) for use in value.uses()]


def _outermost(node: ir.Node) -> ir.Node:
    while node.graph is not None and (parent := getattr(node.graph, "parent_node", None)) is not None:
        node = parent
    return node


def _downstream(model: ir.Model, is_target: Callable[[ir.Node], bool]) -> list[ir.Node]:
    """Nodes that read a large weight and everything that depends on them, in the graph's order."""
    reached: set[ir.Value] = set()
    nodes = []
    for node in model.graph:
        if is_target(node) or any(value in reached or _is_large(value) for value in captured(node)):
            nodes.append(node)
            reached.update(node.outputs)
    return nodes
