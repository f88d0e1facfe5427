"""Small graph edits that the small passes of `prepare` and the others share."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# The domain of operators that ONNX Runtime alone has.
MICROSOFT = "com.microsoft"
# Nodes that a type is looked for in.
_NEAR = 64


class Decide(Protocol):
    """Leaves one decision behind; Pass.decide."""

    def __call__(self, node: str, action: str, reason: str, **detail: Any) -> None:
        """What happened to the node, and why."""


class Names:
    """Value names that are free in a model, subgraphs included: ONNX wants no name to shadow another."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str | None] = {None, ""}
        for graph in model.graphs():
            self._used.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
            self._used.update(value.name for node in graph for value in node.outputs)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or with a number behind it; taken from now on."""
        name, count = wanted, 0
        while name in self._used:
            count += 1
            name = f"{wanted}_{count}"
        self._used.add(name)
        return name


def stem(name: str | None, limit: int = 48) -> str:
    """A name to make others of: a long one is cut, and told apart by a digest of it.

    Exporters name a node after everything that was fused into it, some hundred letters; five new names for each
    activation would be larger than a small model's weights.
    """
    text = str(name)
    return text if len(text) <= limit else f"{text[: limit - 9]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; None for an operand that is left out, an input and an initializer."""
    return value.producer() if value is not None else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer whose content nobody can change when the model runs."""
    return value is not None and value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def is_adapter(value: ir.Value) -> bool:
    """Whether a value is a graph input with a default that may be of other sizes than that, as an adapter's (LoRA)."""
    free = any(not isinstance(size, int) for size in value.shape or ())
    tensor = value.const_value if value.is_graph_input() and value.is_initializer() else None
    return tensor is not None and (free or tensor.size == 0)


def float_type(node: ir.Node) -> ir.DataType:
    """The float type that a node of one type of floats computes in, where an inner value's may be unknown.

    Case 1: what a Cast makes; nothing is looked for behind it.
    Case 2: that of an output or an input, as inference or a constant (the scale of a DequantizeLinear, say) tells it.
    Case 3: that of what gives it its inputs, the nearest that is known, within so many nodes.
    FLOAT where nothing tells.
    """
    waiting = [node]
    for own in waiting:  # it grows
        if own.op_type == "Cast":  # Case 1
            known = [ir.DataType(own.attributes.get_int("to", ir.DataType.FLOAT))]
        else:  # Case 2
            known = [told for value in (*own.outputs, *own.inputs) if (told := _known_type(value)) is not None]
        found = next((told for told in known if told.is_floating_point()), None)
        if found is not None:
            return found
        given = [value.producer() for value in own.inputs if value is not None and own.op_type != "Cast"]
        waiting += [p for p in given if p is not None and p not in waiting][: max(_NEAR - len(waiting), 0)]  # Case 3
    return ir.DataType.FLOAT


def _known_type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def decided(model: ir.Model) -> set[ir.Value]:
    """Every value that constants alone decide, initializers among them."""
    found = {value for graph in model.graphs() for value in graph.initializers.values() if is_constant(value)}
    for node in model.graph.all_nodes():
        read = [value for value in node.inputs if value is not None]
        if (read and found.issuperset(read)) or (node.op_type, node.domain) == ("Constant", ""):
            found.update(node.outputs)
    return found


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the graph; a number is appended to a name that another initializer has."""
    free, count = name, 1
    while free in graph.initializers:
        free, count = f"{name}.{count}", count + 1
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    value = ir.Value(name=free, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def insert_before(
    place: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    *,
    name: str,
    output: str,
    domain: str = "",
) -> ir.Value:
    """The output, called `output`, of a new node that stands right before `place` in its graph."""
    node = ir.node(op_type, inputs, attributes, name=name, domain=domain)
    node.outputs[0].name = output
    assert place.graph is not None
    place.graph.insert_before(place, node)
    return node.outputs[0]


def turned_before(place: ir.Node, matrix: ir.Value, name: str) -> ir.Value:
    """The transposed matrix, of known shape and type, from a new node right before `place`; both are called `name`."""
    turned = insert_before(place, "Transpose", [matrix], {"perm": [1, 0]}, name=name, output=name)
    shape = matrix.shape if matrix.const_value is None else ir.Shape(matrix.const_value.shape.numpy())
    turned.type, turned.shape = matrix.type, ir.Shape(list(shape)[::-1]) if shape is not None else None
    return turned


def constant_before(place: ir.Node, array: npt.NDArray[Any], *, output: str) -> ir.Value:
    """The output of a new Constant node right before `place`; unlike an initializer it may stand in a function."""
    value = insert_before(place, "Constant", [], {"value": ir.tensor(array, name=output)}, name=output, output=output)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return value


def take_over(old: ir.Value, new: ir.Value, names: Names) -> None:
    """Put `new` where `old` is used, as a graph output too, under the old name, shape and type."""
    new.shape, new.type = old.shape, old.type
    name = old.name
    old.name = names.fresh(f"{name}_replaced")
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def small_array(value: ir.Value | None, limit: int = 64) -> npt.NDArray[Any] | None:
    """The content of a small constant, an initializer or a Constant node's output; None for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return np.asarray(tensor.numpy()) if tensor is not None and tensor.size <= limit else None
