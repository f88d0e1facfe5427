"""A weight that no format takes: one that is scaled when the model runs, as by an adapter."""

import onnx_ir as ir


def scale_at_run_time(model: ir.Model, name: str) -> None:
    """Multiply the weight of the MatMul of that name by a number computed from the first input."""
    graph = model.graph
    node = next(node for node in graph if node.name == name)
    number = ir.node("Cast", [graph.inputs[0]], {"to": int(ir.DataType.FLOAT)})
    largest = ir.node("ReduceMax", [number.outputs[0]], {"keepdims": 0})
    factor = ir.node("Sigmoid", [largest.outputs[0]])
    scaled = ir.node("Mul", [node.inputs[1], factor.outputs[0]])
    for i, made in enumerate((number, largest, factor, scaled)):
        made.outputs[0].name = f"{name}.scaled.{i}"
        graph.insert_before(node, made)
    node.replace_input_with(1, scaled.outputs[0])
