"""passes/conform: a graph that keeps to the rules has no fault, and each rule's is found where it is planted."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.passes.conform import CHECKS
from qcompile.passes.conform.findings import Findings
from qcompile.passes.targets import TARGETS

Plant = Callable[[onnx.ModelProto], object]
K, N, BLOCK = 64, 8, 32


def _tensor(name: str, values: object, kind: int) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, np.shape(values), np.ravel(values).tolist())


def _scales(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.02, np.float32), name)


def _codes(name: str, *shape: int, kind: int = TensorProto.INT8) -> onnx.TensorProto:
    return _tensor(name, np.random.default_rng(0).integers(-7, 8, shape), kind)


def _tensorrt() -> onnx.ModelProto:
    """x in INT8 times an INT8 weight, plus x times an INT4 weight in blocks."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zero"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zero"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w8", "s8"], ["w8d"], name="w8.dq", axis=1),
        helper.make_node("DequantizeLinear", ["w4", "s4"], ["w4d"], name="w4.dq", axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["xd", "w8d"], ["a"], name="product8"),
        helper.make_node("MatMul", ["x", "w4d"], ["b"], name="product4"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    constants = [
        _scales("sx"), _tensor("zero", 0, TensorProto.INT8), _codes("w8", K, N), _scales("s8", N),
        _codes("w4", K, N, kind=TensorProto.INT4), _scales("s4", K // BLOCK, N),
    ]  # fmt: skip
    return _model(nodes, constants, ["batch", K], ["batch", N])


def _qnn() -> onnx.ModelProto:
    """Sigmoid(x) and a product in 16 bits with an int8 weight; a MatMulNBits."""
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"], name="sigmoid"),
        helper.make_node("QuantizeLinear", ["s", "sx", "zx"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w8", "s8"], ["w8d"], name="w8.dq", axis=1),
        helper.make_node("MatMul", ["xd", "w8d"], ["a"], name="product8"),
        helper.make_node("MatMulNBits", ["x", "w4", "s4"], ["b"], name="product4", domain="com.microsoft",
                         K=K, N=N, bits=4, block_size=BLOCK),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]  # fmt: skip
    constants = [
        numpy_helper.from_array(np.float32(2.0**-16), "sx"), _tensor("zx", 0, TensorProto.UINT16),
        _codes("w8", K, N), _scales("s8", N),
        numpy_helper.from_array(np.zeros((N, K // BLOCK, BLOCK // 2), np.uint8), "w4"), _scales("s4", N, K // BLOCK),
    ]  # fmt: skip
    return _model(nodes, constants, [1, 4, K], [1, 4, N])


def _model(nodes: list, constants: list, x: list, y: list) -> onnx.ModelProto:
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x), ("y", y)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "rules", [given], [made], constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


GRAPHS = {"tensorrt": _tensorrt, "qnn": _qnn}


def _check(target: str, model: onnx.ModelProto) -> Findings:
    return CHECKS[target](ir.serde.deserialize_model(model))


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def put(tensor: onnx.TensorProto) -> Plant:
    """Another constant of the same name."""

    def plant(model: onnx.ModelProto) -> None:
        next(own for own in model.graph.initializer if own.name == tensor.name).CopyFrom(tensor)

    return plant


def given(name: str, **attributes: int) -> Plant:
    """Other attributes of a node."""

    def plant(model: onnx.ModelProto) -> None:
        node = _node(model, name)
        kept = [own for own in node.attribute if own.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept + [helper.make_attribute(*own) for own in attributes.items()])

    return plant


def read(name: str, position: int, tensor: onnx.TensorProto) -> Plant:
    """Another constant at an input of a node."""

    def plant(model: onnx.ModelProto) -> None:
        node = _node(model, name)
        node.input.extend([""] * (position + 1 - len(node.input)))
        node.input[position] = tensor.name
        model.graph.initializer.append(tensor)

    return plant


def add(*node: object, **attributes: object) -> Plant:
    """One more node."""
    return lambda model: model.graph.node.append(helper.make_node(*node, **attributes))  # type: ignore[arg-type]


def computed(name: str) -> Plant:
    """A scale that another node gives."""

    def plant(model: onnx.ModelProto) -> None:
        node = _node(model, name)
        model.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"], name="abs"))
        node.input[1] = "computed"

    return plant


def _int4_from_x(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(_tensor("zero4", 0, TensorProto.INT4))
    for name in ("q", "dq"):
        _node(model, name).input[2] = "zero4"


def _opset_20(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


def _along_the_first_of_three(model: onnx.ModelProto) -> None:
    put(_codes("w4", K, K, N, kind=TensorProto.INT4))(model)
    put(_scales("s4", K // BLOCK, K, N))(model)


RULES: dict[str, tuple[str, Plant, str]] = {
    "1 run time": ("tensorrt", add("DynamicQuantizeLinear", ["x"], ["d", "e", "f"], name="n"), "does not have"),
    "1 qlinear": (
        "tensorrt",
        add("QLinearAdd", ["x"], ["d"], name="n", domain="com.microsoft"),
        "'n' is an operator that TensorRT does not have",
    ),
    "1 nbits": ("tensorrt", add("MatMulNBits", ["x"], ["d"], name="n", domain="com.microsoft"), "does not have"),
    "1 own": ("tensorrt", add("MatMulInt4", ["x"], ["d"], name="n", domain="qcompile"), "does not have"),
    "2 unsigned": ("tensorrt", put(_tensor("zero", 0, TensorProto.UINT8)), "'q' has codes of type uint8"),
    "2 wide": ("tensorrt", put(_tensor("zero", 0, TensorProto.INT16)), "'dq' has codes of type int16"),
    "2 bias": ("tensorrt", put(_codes("w8", K, N, kind=TensorProto.INT32)), "'w8.dq' has codes of type int32"),
    "2 unsigned nibbles": (
        "tensorrt",
        put(_tensor("w4", np.ones((K, N), int), TensorProto.UINT4)),
        "'w4.dq' has codes of type uint4",
    ),
    "3": ("tensorrt", put(_tensor("zero", 1, TensorProto.INT8)), "'dq' has zero points other than 0"),
    "3 of a weight": (
        "tensorrt",
        read("w8.dq", 2, _tensor("zeros", np.eye(N, dtype=int)[0], TensorProto.INT8)),
        "'w8.dq' has zero points other than 0",
    ),
    "4 computed": ("tensorrt", computed("w8.dq"), "'w8.dq' has scales that are no constant"),
    "4 negative": ("tensorrt", put(numpy_helper.from_array(-np.ones(N, np.float32), "s8")), "not positive"),
    "4 zero": ("tensorrt", put(numpy_helper.from_array(np.zeros(N, np.float32), "s8")), "not positive"),
    "4 infinite": ("tensorrt", put(numpy_helper.from_array(np.float32(np.inf), "sx")), "'q' has scales that are not"),
    "5 activation": ("tensorrt", put(_scales("sx", K)), "'q' has several scales for an activation"),
    "5 axis": ("tensorrt", given("w8.dq", axis=0), r"'w8.dq' has scales of shape \(8,\) for codes of shape \(64, 8\)"),
    "6 opset": ("tensorrt", _opset_20, "'w4.dq' has blocks in opset 20"),
    "6 partial": ("tensorrt", given("w4.dq", block_size=48), "'w4.dq' has blocks of 48 that do not cut"),
    "6 rank": ("tensorrt", _along_the_first_of_three, "'w4.dq' has blocks along axis 0 of rank 3"),
    "7 activation": ("tensorrt", _int4_from_x, "'q' has int4 codes that are no constant weight"),
    "7 reader": ("tensorrt", add("Abs", ["w4d"], ["d"], name="n"), "'w4.dq' has int4 codes that something else"),
    "qnn 1": ("qnn", add("MatMulInteger", ["x", "x"], ["d"], name="n"), "'n' is an operator that the QNN provider"),
    "qnn 2 bits": ("qnn", given("product4", bits=3), "'product4' has 3 bits: 2, 4 or 8"),
    "qnn 2 block": ("qnn", given("product4", block_size=128), "'product4' has blocks of 128: 32 or 64"),
    "qnn 2 rows": ("qnn", given("product4", K=80), "'product4' has 80 rows, no multiple of its blocks of 32"),
    "qnn 2 zero points": ("qnn", read("product4", 3, _tensor("z", [0], TensorProto.UINT8)), "has zero points"),
    "qnn 2 order": ("qnn", read("product4", 4, _tensor("o", [0], TensorProto.INT32)), "has an order of groups"),
    "qnn 2 bias": ("qnn", read("product4", 5, _scales("bias", N)), "'product4' has a bias"),
    "qnn 2 scales": (
        "qnn",
        put(numpy_helper.from_array(-np.ones((N, K // BLOCK), np.float32), "s4")),
        "'product4' has scales that are no positive constants",
    ),
    "qnn 3 type": ("qnn", put(_tensor("zx", 0, TensorProto.INT32)), "'q' has codes of an activation that are not"),
    "qnn 3 scales": ("qnn", put(_scales("sx", K)), "'q' has several scales for an activation"),
    "qnn 3 computed": ("qnn", computed("q"), "'q' has scales that are no constant"),
    "qnn 4 type": ("qnn", put(_tensor("w8", np.ones((K, N), int), TensorProto.UINT8)), "'w8.dq' has codes of a weight"),
    "qnn 4 zero point": (
        "qnn",
        read("w8.dq", 2, _tensor("zeros", np.eye(N, dtype=int)[0], TensorProto.INT8)),
        "'w8.dq' has zero points of a weight",
    ),
    "qnn 4 axis": ("qnn", given("w8.dq", axis=0), "'w8.dq' has a scale for each index of axis 0 of a weight of MatMul"),
    "qnn 4 blocks": ("qnn", given("w8.dq", block_size=32), "'w8.dq' has blocks beside an activation in codes"),
    "qnn 5": ("qnn", put(numpy_helper.from_array(np.float32(2.0**-15), "sx")), "'q' has scale 3.05e-05 .* Sigmoid"),
}


@pytest.mark.parametrize("target", GRAPHS)
def test_a_graph_that_keeps_to_the_rules_has_no_fault(target: str) -> None:
    found = _check(target, GRAPHS[target]())
    assert found.broken == []
    assert sum(found.checked.values()) == 4
    assert found.remarks == []


@pytest.mark.parametrize("name", RULES)
def test_a_planted_fault_is_found(name: str) -> None:
    target, plant, message = RULES[name]
    model = GRAPHS[target]()
    plant(model)
    with pytest.raises(AssertionError, match=message):
        assert not (broken := _check(target, model).broken), "; ".join(broken)


def test_every_rule_has_its_fault() -> None:
    """As many as the checks' docstrings number."""
    for target, prefix in (("tensorrt", ""), ("qnn", "qnn ")):
        told = (CHECKS[target].__doc__ or "").count("Rule ")
        planted = {name.removeprefix(prefix)[0] for name in RULES if RULES[name][0] == target}
        assert planted == {str(number) for number in range(1, told + 1)}


def test_what_is_no_fault_for_qnn_is_told() -> None:
    model = _qnn()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "rows"
    add("GatherBlockQuantized", ["t", "i", "s"], ["d"], name="n", domain="com.microsoft")(model)
    model.graph.initializer.extend([_codes("w", K, N), _scales("sw", N)])
    add("DequantizeLinear", ["w", "sw"], ["wd"], name="alone")(model)
    add("MatMul", ["x", "wd"], ["alone.y"], name="alone.product")(model)
    found = _check("qnn", model)
    assert found.broken == []
    told = "; ".join(found.remarks)
    for part in ("1 DequantizeLinear of weights alone", "1 lookups in codes", "without fixed sizes", ": x;"):
        assert part in told


def test_every_target_of_another_runtime_is_checked() -> None:
    assert CHECKS.keys() == {name for name, own in TARGETS.items() if own.runtime}
