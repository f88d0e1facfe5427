"""passes/prepare/edit.py: initializers that passes add."""

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.passes.prepare.edit import add_initializer


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
