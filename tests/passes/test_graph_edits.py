"""passes/graph.py: initializers that passes add."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.models.tiny.build import Builder
from qcompile.passes.graph import add_initializer, float_type


def _graph() -> ir.Graph:
    b = Builder(opset=21)
    return b.model({"y": b.Add(b.input("x", b.dtype, [2, 3]), b.weight("w", np.ones((2, 3), np.float32)))}).graph


def test_an_initializer_states_its_shape_and_type() -> None:
    graph, tensor = _graph(), ir.tensor(np.zeros((4, 5), np.int8))
    value = add_initializer(graph, "codes", tensor)
    assert graph.initializers["codes"] is value
    assert value.const_value is tensor
    assert (list(value.shape or ()), value.dtype) == ([4, 5], ir.DataType.INT8)


def test_a_taken_name_gets_a_number_and_the_first_value_stays() -> None:
    graph = _graph()
    first = graph.initializers["w"]
    names = [add_initializer(graph, "w", ir.tensor(np.zeros(3, np.float32))).name for _ in range(2)]
    assert names == ["w.1", "w.2"]
    assert graph.initializers["w"] is first


def test_a_tensor_shared_by_two_initializers_is_not_renamed() -> None:
    graph = _graph()
    tensor = ir.tensor(np.zeros(3, np.float32), name="shared")
    made = [add_initializer(graph, name, tensor) for name in ("a", "b")]
    assert [value.name for value in made] == ["a", "b"]
    assert tensor.name == "shared"


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp64"])
def test_the_type_of_a_node_is_found_where_inference_tells_nothing(dtype: str) -> None:
    """By its constants, the scale behind its codes, or what gives it its inputs; a Cast is the last word."""
    kind = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT, "fp64": ir.DataType.DOUBLE}[dtype]
    other = ir.DataType.DOUBLE if kind != ir.DataType.DOUBLE else ir.DataType.FLOAT
    x, w = (
        ir.Value(name="x", type=ir.TensorType(other)),
        ir.Value(name="w", const_value=ir.tensor(np.ones(3, kind.numpy()))),
    )
    cast = ir.node("Cast", [x], {"to": ir.AttrInt64("to", kind)})
    clipped = ir.node("Clip", [ir.node("Relu", [cast.outputs[0]]).outputs[0]])
    codes = ir.Value(name="codes", const_value=ir.tensor(np.ones(3, np.int8)))
    read = ir.node("DequantizeLinear", [codes, w])
    product = ir.node("MatMul", [ir.Value(name="unknown"), ir.node("Transpose", [read.outputs[0]]).outputs[0]])
    to_int = ir.node("Cast", [x], {"to": ir.AttrInt64("to", ir.DataType.INT64)})
    added = ir.node("Add", [ir.Value(name="unknown"), w])
    assert [float_type(node) for node in (cast, clipped, read, product, added)] == [kind] * 5
    assert float_type(ir.node("Relu", [ir.node("Neg", [to_int.outputs[0]]).outputs[0]])) == ir.DataType.FLOAT, (
        "not that before an integer"
    )
    assert float_type(ir.node("Relu", [ir.Value(name="nothing")])) == ir.DataType.FLOAT
