"""passes/qdq/providers.py: each row of the table against ONNX Runtime's optimized graph, and the numbers with it."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from qdq_graphs import STEP, X86, Tiny, optimized

from qcompile.passes.qdq.providers import FLOAT_ON_CPU, RULES, TYPES, Rule, rule_of

IMAGE = (1, 8, 10, 10)
# What a node needs beside its quantized inputs.
ATTRIBUTES: dict[str, dict] = {
    "AveragePool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "BatchNormalization": {},
    "Concat": {"axis": 1},
    "Conv": {"pads": [1, 1, 1, 1]},
    "DepthToSpace": {"blocksize": 2},
    "Gather": {"axis": 1},
    "MaxPool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "SimplifiedLayerNormalization": {"axis": -1},
    "SpaceToDepth": {"blocksize": 2},
    "Split": {"axis": 1},
}
SHORT = np.ones(8, np.float32)
CONSTANTS: dict[str, dict[int, np.ndarray]] = {
    "BatchNormalization": {1: SHORT, 2: SHORT, 3: SHORT, 4: SHORT},
    "Expand": {1: np.array([2, 8, 10, 10])},
    "Gather": {1: np.array([1, 3])},
    "GatherElements": {1: np.zeros(IMAGE, np.int64)},
    "InstanceNormalization": {1: SHORT, 2: SHORT},
    "LayerNormalization": {1: np.ones(10, np.float32)},
    "Pad": {1: np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    "ReduceMax": {1: np.array([1])},
    "ReduceMean": {1: np.array([1])},
    "ReduceMin": {1: np.array([1])},
    "ReduceSum": {1: np.array([1])},
    "Reshape": {1: np.array([1, 80, 10])},
    "Resize": {2: np.array([1, 1, 2, 2], np.float32)},
    "SimplifiedLayerNormalization": {1: np.ones(10, np.float32)},
    "SkipLayerNormalization": {2: np.ones(10, np.float32)},
    "Slice": {1: np.array([1]), 2: np.array([3]), 3: np.array([1])},
    "Split": {1: np.array([4, 4])},
    "Squeeze": {1: np.array([0])},
    "Tile": {1: np.array([1, 1, 2, 1])},
    "Unsqueeze": {1: np.array([0])},
    "Where": {0: np.arange(800).reshape(IMAGE) % 3 == 0},
}
WEIGHTS = {"Conv": (16, 8, 3, 3), "ConvTranspose": (8, 16, 3, 3), "MatMul": (32, 16), "Gemm": (32, 16)}
INPUTS = {"MatMul": (4, 32), "Gemm": (4, 32), "SkipLayerNormalization": (2, 8, 10)}
TWO_INPUTS = {"Div", "Max", "Min", "PRelu", "Pow", "Sub", "SkipLayerNormalization"}


def _row(operator: str, rule: Rule | None, *, dtype=np.uint8, output: bool = True, scale: float = STEP) -> Tiny:
    """The operator between DequantizeLinears and, if `output`, QuantizeLinears, as its rule tells."""
    tiny, inputs = Tiny(), dict(CONSTANTS.get(operator, {}))
    places = rule.activations if rule else tuple(range(2 if operator in TWO_INPUTS else 1))
    shape = INPUTS.get(operator, IMAGE)
    names = {place: tiny.constant(value) for place, value in inputs.items()}
    for place in (0, 1, 2) if places == "all" else places:
        if rule is None or place != rule.weight:
            names[place] = tiny.qdq(tiny.input(*shape), dtype)
    if rule and rule.weight is not None:
        scales = tiny.scales(WEIGHTS[operator], rule.axis)
        names[rule.weight] = tiny.weight(WEIGHTS[operator], rule.axis, scale=scales)
        if rule.bias is not None:
            names[rule.bias] = tiny.int32_bias(np.float32(STEP) * scales)
    listed = [names.get(place, "") for place in range(max(names) + 1)]
    domain = "com.microsoft" if operator.startswith("Skip") else ""
    made = tiny.op(operator, listed, 2 if operator == "Split" else 1, domain=domain, **ATTRIBUTES.get(operator, {}))
    return tiny.output(*[tiny.qdq(name, dtype, scale) if output else name for name in made])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("operator", [name for name, rule in RULES.items() if rule.cpu != "float"])
def test_rows_fuse_on_the_cpu(tmp_path, operator, dtype) -> None:
    """One fused operator, a Q for each input and a DQ for each output; at most one step apart where it rounds."""
    rule = RULES[operator]
    tiny = _row(operator, rule, dtype=dtype)
    found = optimized(tiny, tmp_path, atol=1e-4 if rule.output == "same" else 1.01 * STEP)
    edges = {"QuantizeLinear": len(tiny.inputs), "DequantizeLinear": len(tiny.outputs)}
    assert found - Counter({"Transpose": 2} if operator == "Conv" else {}) == Counter({rule.cpu: 1} | edges)


@pytest.mark.parametrize("operator", [name for name, rule in RULES.items() if rule.output == "optional"])
def test_optional_rows_fuse_without_an_output(tmp_path, operator) -> None:
    found = optimized(_row(operator, RULES[operator], output=False), tmp_path)
    assert found == {RULES[operator].cpu_float: 1, "QuantizeLinear": 1}


@pytest.mark.parametrize("operator", [name for name, rule in RULES.items() if rule.output == "required"])
def test_required_rows_stay_float_without_an_output(tmp_path, operator) -> None:
    found = optimized(_row(operator, RULES[operator], output=False), tmp_path)
    assert found[operator] == 1
    assert found["DequantizeLinear"] > 0


@pytest.mark.parametrize("operator", [name for name, rule in RULES.items() if rule.output == "same"])
def test_moved_codes_need_one_scale(tmp_path, operator) -> None:
    tiny = _row(operator, RULES[operator], scale=2 * STEP)
    found = optimized(tiny, tmp_path)
    assert found["DequantizeLinear"] == len(tiny.outputs) + 1


@pytest.mark.parametrize("operator", sorted(FLOAT_ON_CPU | {"ConvTranspose"}))
def test_float_operators_keep_q_and_dq(tmp_path, operator) -> None:
    tiny = _row(operator, RULES.get(operator))
    found = optimized(tiny, tmp_path, atol=1.01 * STEP)
    assert not [name for name in found if name.startswith("QLinear") or "Integer" in name]
    assert found["QuantizeLinear"] == len(tiny.inputs) + 1
    assert found["DequantizeLinear"] == len(tiny.inputs) + 1 + (operator == "ConvTranspose")


@pytest.mark.parametrize("operator", [name for name in RULES if RULES[name].cpu not in ("float", name)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_16_bits_do_not_fuse(tmp_path, operator, dtype) -> None:
    """The products are less exact: from 1.32 on a dequantized weight alone makes them MatMulNBits."""
    tiny = _row(operator, RULES[operator], dtype=dtype)
    found = optimized(tiny, tmp_path, atol=0.3 if operator in ("MatMul", "Gemm") else 1.01 * STEP)
    assert RULES[operator].cpu not in found
    assert found["DequantizeLinear"] > len(tiny.outputs)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("types", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8"), ("int8", "uint8")])
def test_types_of_products(tmp_path, types, axis) -> None:
    """On x86-64 ONNX Runtime turns int8 activations into uint8 where it can; elsewhere int8 by uint8 is not tried."""
    if types == ("int8", "uint8") and not X86:
        pytest.skip("int8 activations with uint8 weights fuse on x86-64 only")
    activation, weight = (getattr(np, name) for name in types)
    tiny = Tiny()
    product = tiny.one("MatMul", tiny.qdq(tiny.input(4, 32), activation), tiny.weight((32, 16), axis, weight))
    assert optimized(tiny.output(product), tmp_path) == {"MatMulIntegerToFloat": 1, "QuantizeLinear": 1}
    tiny = Tiny()
    kernel = tiny.weight((16, 8, 3, 3), axis and 0, weight)
    tiny.output(tiny.qdq(tiny.one("Conv", tiny.qdq(tiny.input(*IMAGE), activation), kernel), activation, 10 * STEP))
    found = optimized(tiny, tmp_path, atol=10.1 * STEP)
    assert found == {"QLinearConv": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 2}


@pytest.mark.skipif(not X86, reason="the conversion from int8 to uint8 is for x86-64")
def test_int8_values_with_two_readers_do_not_fuse(tmp_path) -> None:
    """Why activations are uint8 on the CPU."""
    for dtype, fused in ((np.uint8, 3), (np.int8, 0)):
        tiny = Tiny()
        x = tiny.qdq(tiny.input(4, 32), dtype)
        tiny.output(*[tiny.one("MatMul", x, tiny.weight((32, 16), 1)) for _ in range(3)])
        found = optimized(tiny, tmp_path)
        assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (fused, 3 - fused)
    assert TYPES["cpu"].activation == ir.DataType.UINT8


def test_attributes_decide() -> None:
    x = [ir.Value(name="x"), ir.Value(name="w")]
    assert rule_of(ir.node("Resize", x[:1])) == RULES["Resize"]
    assert rule_of(ir.node("Resize", x[:1], {"mode": "linear"})) == "Resize in mode linear is computed in float"
    assert rule_of(ir.node("MaxPool", x[:1], num_outputs=2)) == "MaxPool with indices is computed in float"
    assert rule_of(ir.node("Conv", x, domain="com.microsoft")) == "Conv is computed in float"
    assert rule_of(ir.node("Gelu", x[:1])) == "Gelu is computed in float"
    transposed = rule_of(ir.node("Gemm", x, {"transB": 1}))
    assert isinstance(transposed, Rule)
    assert (transposed.axis, RULES["Gemm"].axis) == (0, 1)


def test_the_table_is_coherent() -> None:
    assert not FLOAT_ON_CPU & set(RULES)
    for operator, rule in RULES.items():
        assert (rule.weight is None) == (rule.axis is None), operator
        assert (rule.cpu_float is None) == (rule.output != "optional"), operator
        assert (rule.output == "same") == (rule.cpu == operator), operator


def _in_half(tiny: Tiny) -> onnx.ModelProto:
    """The same in float16, but for the factors of a Resize."""
    model = onnx.load_from_string(tiny.model())
    factors = {node.input[2] for node in model.graph.node if node.op_type == "Resize"}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in factors:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


@pytest.mark.parametrize("operator", [name for name, rule in RULES.items() if rule.cpu != "float"])
def test_rows_of_float16_load_but_for_concat(operator) -> None:
    """`is_half_concat` keeps Q and DQ from it; there would be others to keep them from, or none, if this failed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = _in_half(_row(operator, RULES[operator])).SerializeToString()
    if operator == "Concat":
        with pytest.raises(Exception, match="QLinearConcat"):
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    else:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
