"""Products of float64 weights, which no integer format and few kernels take."""

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, insert_before, turned_before
from qcompile.passes.linears import Linear, constant, dimensions, find_embeddings, find_linears
from qcompile.passes.tensors import lazy


def narrow_doubles(model: ir.Model, decide: Decide) -> None:
    """A MatMul by a constant float64 weight, and a lookup in such a table, become float32 ones between Casts.

    The values around stay float64; what the product rounds is 1e-7 of it, a thousandth of what codes do.
    """
    names, cast = Names(model), dict[ir.Value, ir.Value]()
    for linear in find_linears(model.graph.all_nodes()):
        if constant(linear.weight).dtype == ir.DataType.DOUBLE:
            x, read = _cast(linear.node, linear.activation, names), _read(linear, _narrowed(model, linear.weight, cast))
            _replace(linear.node, [x, read], names, decide)
    for embedding in find_embeddings(model.graph.all_nodes()):
        if constant(embedding.table).dtype == ir.DataType.DOUBLE:
            _replace(embedding.node, [_narrowed(model, embedding.table, cast), embedding.indices], names, decide)


def _cast(place: ir.Node, value: ir.Value, names: Names) -> ir.Value:
    """The value in float32, made once for all that read it in one graph."""
    for use in value.uses():
        node = use.node
        if node.op_type == "Cast" and node.graph is place.graph and node.attributes.get_int("to", 0) == 1:
            return node.outputs[0]
    name = names.fresh(f"{value.name}_float32")
    made = insert_before(place, "Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=name, output=name)
    made.dtype, made.shape = ir.DataType.FLOAT, value.shape
    return made


def _narrowed(model: ir.Model, weight: ir.Value, cast: dict[ir.Value, ir.Value]) -> ir.Value:
    """The constant in float32, converted whenever it is read."""
    if weight not in cast:
        tensor, dtype = constant(weight), ir.DataType.FLOAT
        made = lazy(tensor, lambda array: array.astype("float32"), shape=dimensions(weight), dtype=dtype)
        cast[weight] = add_initializer(model.graph, f"{weight.name}_float32", made)
    return cast[weight]


def _read(linear: Linear, weight: ir.Value) -> ir.Value:
    """The weight as the linear reads it."""
    if not linear.transposed:
        return weight
    return turned_before(linear.node, weight, f"{linear.name}_turned")


def _replace(node: ir.Node, inputs: list[ir.Value], names: Names, decide: Decide) -> None:
    """The same operator on float32, under the node's name; the node becomes the Cast behind it."""
    name, attributes = str(node.name), dict(node.attributes)
    made = insert_before(node, node.op_type, inputs, attributes, name=name, output=names.fresh(f"{name}_float32"))
    made.dtype, made.shape = ir.DataType.FLOAT, node.outputs[0].shape
    node.op_type, node.name = "Cast", f"{name}_double"
    node.resize_inputs(1)
    node.replace_input_with(0, made)
    node.attributes.clear()
    node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))
    decide(name, "narrowed", "float64 has no integer format: computed in float32 between Casts")
