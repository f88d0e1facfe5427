"""Patterns of names mean something in the model at hand, or are refused with the names that come nearest."""

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.near import nearest
from qcompile.passes.origins import matches, names_of, operators_of

_SHOWN = 3


def check_patterns(include: Sequence[str], exclude: Sequence[str], named: Sequence[str], model: ir.Model) -> None:
    """Raise UserError for a pattern that stands for no node of the prepared model: one with a constant to quantize, or,
    excluded, any node.
    """
    nodes = {node: _constants(node) for node in model.graph.all_nodes() if node.op_type != "Constant"}
    weighted = {node: weights for node, weights in nodes.items() if weights}
    given = ("include", include, weighted), ("exclude", exclude, nodes), ("weights-of", named, weighted)
    for option, patterns, among in given:
        for pattern in patterns:
            if not any(matches(pattern, node, *weights) for node, weights in among.items()) and pattern != "*":
                raise UserError(_told(option, pattern, weighted or nodes))


def _constants(node: ir.Node) -> Sequence[ir.Value]:
    """The float constants that a node reads, maybe through a Transpose."""
    read = (_origin(value) for value in node.inputs)
    return [v for v in read if v is not None and v.const_value is not None and v.const_value.dtype.is_floating_point()]


def _origin(value: ir.Value | None) -> ir.Value | None:
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


def _told(option: str, pattern: str, nodes: dict[ir.Node, Sequence[ir.Value]]) -> str:
    names = dict.fromkeys(name for node, weights in nodes.items() for name in names_of(node, *weights) if name)
    operators = dict.fromkeys(operator for node in nodes for operator in operators_of(node))
    near = ", ".join(map(repr, _nearest(pattern, [*names, *operators])))
    kind = "node, weight or operator" if option == "exclude" else "weight, nor a node or operator with one,"
    return (
        f"--{option} {pattern!r} matches no {kind} of the model; the nearest names are {near} "
        "(a pattern stands for the whole name and minds case, * is for any letters)"
    )


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names most like the pattern, whatever case they are in; those that hold its longest word first."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    word = max(pattern.lower().replace("?", "*").split("*"), key=len)
    holding = sorted((name for name in lower if word and word in name), key=len)
    close = nearest(pattern.lower().replace("*", ""), lower, _SHOWN, alike=0.0)
    return [lower[name] for name in dict.fromkeys([*holding, *close])][:_SHOWN]
