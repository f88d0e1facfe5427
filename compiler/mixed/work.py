"""How much of a model's work each of its nodes is."""

from collections.abc import Mapping, Sequence
from math import prod

import onnx_ir as ir
from onnx import TensorProto, helper

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.walk.extract import extract
from qcompile.passes.graph import is_constant
from qcompile.passes.linears import constant
from qcompile.runtime.sessions import run

# Multiplications in integers that take as long as reading or giving one number and rounding it on the way. One thread
# of ONNX Runtime 1.32 takes 0.23 ns to quantize and dequantize a number, and 0.006 ns for a multiplication of a large
# product (docs/qdq.md).
_NUMBER = 16

Shapes = Mapping[str, Sequence[int]]


def work_of(model: ir.Model, names: Sequence[str], batch: Batch, provider: str) -> dict[str, int]:
    """By name, the work of each of these nodes of the main graph on a batch: its multiplications, and `_NUMBER` for
    each number that it reads from other nodes or gives. The model runs once, for the shapes.
    """
    wanted, nodes = set(names), {}
    for node in model.graph:
        if node.name in wanted:
            nodes[str(node.name)] = node
    read = {name: [v for v in node.inputs if v is not None and not is_constant(v)] for name, node in nodes.items()}
    values = dict.fromkeys(value for name, node in nodes.items() for value in (node.outputs[0], *read[name]))
    shapes = _shapes(model, list(values), batch, provider)
    return {
        name: _multiplications(node, shapes)
        + _NUMBER * sum(prod(shapes[str(value.name)]) for value in (node.outputs[0], *read[name]))
        for name, node in nodes.items()
    }


def _shapes(model: ir.Model, values: Sequence[ir.Value], batch: Batch, provider: str) -> Shapes:
    """The shapes of values on a batch, by name."""
    piece = extract(model, [], values)
    graph = piece.proto.graph
    del graph.output[:]
    for name in piece.outputs:
        graph.node.append(helper.make_node("Shape", [name], [f"{name}.shape"], name=f"{name}.shape"))
        graph.output.append(helper.make_tensor_value_info(f"{name}.shape", TensorProto.INT64, None))
    feeds = {name: array for name, array in batch.feeds.items() if name in piece.inputs}
    given = run(piece.session(provider), [output.name for output in graph.output], feeds)
    return {name: tuple(map(int, shape)) for name, shape in zip(piece.outputs, given, strict=True)}


def _multiplications(node: ir.Node, shapes: Shapes) -> int:
    """Those of a product; none of other nodes, whose numbers count alone."""
    given = prod(shapes[str(node.outputs[0].name)])
    if node.op_type in ("MatMul", "Gemm"):
        turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
        return given * _shape(node.inputs[0], shapes)[-2 if turned else -1]
    if node.op_type not in ("Conv", "ConvTranspose"):
        return 0
    weight = _shape(node.inputs[1], shapes)
    return prod(weight[1:]) * (given if node.op_type == "Conv" else prod(_shape(node.inputs[0], shapes)))


def _shape(value: ir.Value | None, shapes: Shapes) -> Sequence[int]:
    assert value is not None
    return tuple(constant(value).shape.numpy()) if is_constant(value) else shapes[str(value.name)]
