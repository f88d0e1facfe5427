"""Values seen backwards: as a line of an earlier one, and as a line that is limited on both sides."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import onnx_ir as ir

from qcompile.passes.graph import small_array

LIMITS = ("Clip", "Min", "Max", "Relu")
# Steps that are seen backwards from a node, of lines and of limits each: so long is no gate that anybody wrote, and
# chains of thousands of Relu, Add or Mul take the time of their length.
_STEPS = 8


@dataclass(frozen=True, eq=False)
class Line:
    """gain · source + offset, and the nodes that compute it, the last first."""

    source: ir.Value
    gain: float = 1.0
    offset: float = 0.0
    nodes: tuple[ir.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Gate:
    """scale · max(0, min(1, slope · source + offset)), and the nodes that compute it, the last first."""

    source: ir.Value
    slope: float
    offset: float
    scale: float
    nodes: tuple[ir.Node, ...]


def gates(value: ir.Value | None) -> Iterator[Gate]:
    """Every way to see the value as a gate: a HardSigmoid, or a line limited from 0 upwards; scaled or not."""
    for outer in lines(value):
        node = outer.source.producer()
        if outer.offset or node is None or node.domain != "":
            continue
        if node.op_type == "HardSigmoid" and node.inputs[0] is not None:
            slope, offset = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
            yield Gate(node.inputs[0], slope or 0.0, offset or 0.0, outer.gain, (*outer.nodes, node))
        limited, low, high, nodes = _limited(outer.source)
        for line in lines(limited) if low == 0 < high < inf else ():
            slope, offset, scale = line.gain / high, line.offset / high, outer.gain * high
            yield Gate(line.source, slope, offset, scale, (*outer.nodes, *nodes, *line.nodes))


def lines(value: ir.Value | None) -> Iterator[Line]:
    """Every way to see the value as a line: of itself, then of what comes before, step by step."""
    line = Line(value) if value is not None else None
    while line is not None:
        yield line
        line = before(line) if len(line.nodes) < _STEPS else None


def before(line: Line) -> Line | None:
    """The line of what its source is a sum, difference, product or quotient of, with a constant."""
    node = line.source.producer()
    if node is None or node.domain != "" or node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    for position in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
        number, other = _number(node, position), node.inputs[1 - position]
        if number is not None and other is not None:
            break
    else:
        return None
    nodes = (*line.nodes, node)
    if node.op_type in ("Add", "Sub"):
        number = number if node.op_type == "Add" else -number
        return Line(other, line.gain, line.offset + line.gain * number, nodes)
    if node.op_type == "Div":
        return Line(other, line.gain / number, line.offset, nodes) if number else None
    return Line(other, line.gain * number, line.offset, nodes)


def _number(node: ir.Node, position: int) -> float | None:
    """A constant operand of one element that cannot widen the other operand."""
    array, other = small_array(node.inputs[position], 1), node.inputs[1 - position]
    if array is None or array.size != 1 or other is None:
        return None
    if array.ndim and (other.shape is None or len(other.shape) < array.ndim):
        return None
    return float(array.item())


def _limited(value: ir.Value) -> tuple[ir.Value, float, float, tuple[ir.Node, ...]]:
    """The value behind all limits, what they are together, and their nodes."""
    low, high = -inf, inf
    nodes: list[ir.Node] = []
    while len(nodes) < _STEPS and (node := value.producer()) is not None and (found := _limits(node)) is not None:
        value, lower, upper = found
        low, high = min(max(lower, low), high), min(max(upper, low), high)
        nodes.append(node)
    return value, low, high, tuple(nodes)


def _limits(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The value that a node limits, the lower and the upper limit."""
    value = node.inputs[0] if node.inputs else None
    if node.domain != "" or node.op_type not in LIMITS or value is None:
        return None
    if node.op_type == "Relu":
        return value, 0.0, inf
    if node.op_type == "Clip":
        bounds = [_bound(node, 1, -inf), _bound(node, 2, inf)]
        return (value, bounds[0], bounds[1]) if bounds[0] is not None and bounds[1] is not None else None
    for position in (1, 0) if len(node.inputs) == 2 else ():
        number, other = _number(node, position), node.inputs[1 - position]
        if number is not None and other is not None:
            return (other, -inf, number) if node.op_type == "Min" else (other, number, inf)
    return None


def _bound(node: ir.Node, position: int, default: float) -> float | None:
    """A bound of a Clip; None if it is computed."""
    if len(node.inputs) <= position or node.inputs[position] is None:
        return default
    array = small_array(node.inputs[position], 1)
    return float(array.item()) if array is not None and array.size == 1 else None
