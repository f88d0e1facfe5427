"""Scans along constants: stacked layers, as what loops over them is exported."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, is_constant

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def number_steps(model: ir.Model, decide: Decide) -> None:
    """Give a Scan the number of each step in place of a constant that it walks along, and its body a Gather of that.

    The matrices of (steps, …) then are looked up by a computed index, which is a form that weights have anyway: a body
    that takes them as an input reads no constant. Numbers come in the direction in which the constant did. Scans along
    another axis than the first stay.
    """
    names = Names(model)
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Scan" or node.domain != "" or "body" not in node.attributes:
            continue
        body, count = node.attributes["body"].as_graph(), node.attributes.get_int("num_scan_inputs", 0) or 0
        axes = node.attributes.get_ints("scan_input_axes") or [0] * count
        first = len(node.inputs) - count
        for i in range(count):
            table = node.inputs[first + i]
            if axes[i] == 0 and table is not None and is_constant(table) and _is_stack(table):
                _number(model, node, first + i, body, names)
                decide(node.name or "", "rewritten", f"its body looks up the matrix of each step in {table.name}")


def _is_stack(table: ir.Value) -> bool:
    tensor = table.const_value
    return tensor is not None and len(tensor.shape) > 2 and tensor.dtype in _FLOATS


def _number(model: ir.Model, node: ir.Node, place: int, body: ir.Graph, names: Names) -> None:
    """Numbers in the place of one constant input of the Scan."""
    table, old = node.inputs[place], body.inputs[place]
    assert table is not None
    assert table.const_value is not None
    steps = int(table.const_value.shape.numpy()[0])
    numbers = add_initializer(model.graph, names.fresh(f"{table.name}.steps"), ir.tensor(np.arange(steps)))
    step = ir.Value(name=names.fresh(f"{old.name}.step"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    lookup = ir.node("Gather", [table, step], {"axis": 0}, name=names.fresh(f"{old.name}.lookup"))
    lookup.outputs[0].name, lookup.outputs[0].type = names.fresh(f"{old.name}.matrix"), old.type
    lookup.outputs[0].shape = ir.Shape(table.const_value.shape.numpy()[1:])
    ir.convenience.replace_all_uses_with(old, lookup.outputs[0], replace_graph_outputs=True)
    body.inputs[place] = step
    body.insert_before(body[0], lookup) if len(body) else body.append(lookup)
    node.replace_input_with(place, numbers)
