"""Common subexpressions: what is computed twice is computed once."""

from collections.abc import Hashable

import onnx_ir as ir

from qcompile.passes.graph import Decide, small_array

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"}


def merge_equal(model: ir.Model, decide: Decide) -> None:
    """Let every use of a node go to an earlier one with the same operator, attributes and inputs.

    Left alone: random operators and Dropout, other domains than ONNX's own (they may have a state), nodes with
    subgraphs, and a second node whose output is a graph output, because its name must stay.
    """
    first: dict[Hashable, ir.Node] = {}
    merged = 0
    for node in list(model.graph):
        key = _key(node)
        if key is None:
            continue
        known = first.setdefault(key, node)
        if known is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for value, same in zip(node.outputs, known.outputs, strict=True):
            same.shape = same.shape if same.shape is not None else value.shape
            same.type = same.type if same.type is not None else value.type
            ir.convenience.replace_all_uses_with(value, same)
        model.graph.remove(node, safe=True)
        merged += 1
    if merged:
        decide("", "merged", f"{merged} nodes that compute what an earlier one does", nodes=merged)


def _key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that give the same; None for a node that must stay."""
    if node.domain != "" or node.op_type in RANDOM or node.op_type == "Dropout":
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        attributes.append((name, ir.serde.serialize_attribute(attribute).SerializeToString(deterministic=True)))
    inputs = [_identity(value) for value in node.inputs]
    if node.op_type in _COMMUTATIVE:
        inputs.sort(key=repr)
    return node.op_type, tuple(inputs), tuple(attributes), tuple(bool(value.name) for value in node.outputs)


def _identity(value: ir.Value | None) -> Hashable:
    """A small constant is known by its content, any other value by itself."""
    array = small_array(value)
    if array is None:
        return id(value) if value is not None else None
    assert value is not None
    return str(value.dtype), array.shape, array.tobytes()
