"""What a model's author called things, kept through `prepare`, so that a user's patterns find what the source shows.

Invariant: behind `prepare`, a node of any graph that computes what a node of the source computed knows that node's
name, its operator and the names of the constants it read, whatever became of them since (a Gemm is a MatMul now, its
weight is turned round, equal weights are one).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from qcompile.passes.exact import unquoted

# Node meta: its Origin. Model meta: those of all nodes of the source by name, while `prepare` runs.
_META, _NOTED = "qcompile.origin", "qcompile.origins"
# What may stand between a constant and the node that it is the weight of.
_MOVES = {"Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear"}


@dataclass(frozen=True)
class Origin:
    """Names of a source's node and of the constants it read, and its operator."""

    names: tuple[str, ...]
    operator: str


def note_origins(model: ir.Model) -> None:
    """Note what the source calls each node and the constants that it reads; nodes have names of their own by now."""
    nodes = (node for node in model.graph.all_nodes() if node.op_type != "Constant")
    model.meta[_NOTED] = {str(node.name): _origin(node) for node in nodes}


def keep_origins(model: ir.Model) -> None:
    """Keep at every node of the prepared model what was noted of the one that it comes from.

    That is the node of its name, or the gone one whose name its own begins with, as of parts that a node was taken
    apart into (`fc_bias` of `fc`).
    """
    known: Mapping[str, Origin] = model.meta.pop(_NOTED, {})
    there = {node.name for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        found = next((known[name] for name in _stems(str(node.name), there) if name in known), None)
        if found is not None:
            node.meta[_META] = found


def names_of(node: ir.Node, *values: ir.Value | None) -> tuple[str, ...]:
    """Every name that a pattern may call the node by: its own first, those of its weights, and those of its origin."""
    origin: Origin | None = node.meta.get(_META)
    own = [str(node.name or ""), *(str(value.name) for value in values if value is not None)]
    return (own[0], *dict.fromkeys(name for name in (*own[1:], *(origin.names if origin else ())) if name != own[0]))


def source_of(node: ir.Node, weight: ir.Value) -> str:
    """What the source calls a weight of the node, whose prepared name may say more (`w_transposed`); its own name where
    the source is not known.
    """
    origin: Origin | None = node.meta.get(_META)
    read = () if origin is None else origin.names[1:]
    return max((name for name in read if str(weight.name).startswith(name)), key=len, default=str(weight.name))


def operators_of(node: ir.Node) -> tuple[str, ...]:
    """The node's operator, and that which it was in the source."""
    origin: Origin | None = node.meta.get(_META)
    return (node.op_type,) if origin is None else (node.op_type, origin.operator)


def fits(pattern: str, name: str) -> bool:
    """Whether a shell pattern stands for a name: the very name, or the pattern with or without meaning in its brackets
    (`layers[0]` is also what torch calls the first of a list).
    """
    return pattern == name or fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


def matches(pattern: str, node: ir.Node, *weights: ir.Value | None) -> bool:
    """Whether a user's pattern means the node: by a name of its own or of its weights, or as the operator it is; in
    quotes, by the very name of one of its weights as the prepared graph has it, and nothing else.
    """
    exact = unquoted(pattern)
    if exact is not None:
        return any(value is not None and value.name == exact for value in weights)
    return pattern in operators_of(node) or any(fits(pattern, name) for name in names_of(node, *weights))


def _stems(name: str, there: set[str | None]) -> Iterator[str]:
    yield name
    for end in range(len(name) - 1, 0, -1):
        if not name[end].isalnum() and name[:end] not in there:
            yield name[:end]


def _origin(node: ir.Node) -> Origin:
    read = (_constant(value) for value in node.inputs)
    return Origin((str(node.name), *(str(value.name) for value in read if value is not None)), node.op_type)


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is, maybe moved or converted."""
    for _ in range(8):
        if value is None or value.const_value is not None:
            return value
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant":
            return value
        value = producer.inputs[0] if producer is not None and producer.op_type in _MOVES and producer.inputs else None
    return None
