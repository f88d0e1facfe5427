"""What ONNX Runtime's CPU provider fuses around products: readers, biases, activations, functions, other schemes."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from qdq_graphs import STEP, VERSION, Tiny, optimized

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHT = (32, 16)
measured = pytest.mark.skipif(VERSION < (1, 32), reason="older than 1.32, where 8-bit weights alone stay float")


def _product(tiny: Tiny, *shape: int | str, **weight) -> str:
    """A MatMul of a quantized input (…, 32) with a weight (32, 16) of one scale a column."""
    return tiny.one("MatMul", tiny.qdq(tiny.input(*(shape or (4, 32)))), tiny.weight(WEIGHT, 1, **weight))


@pytest.mark.parametrize("second", [np.uint8, np.int8])
@pytest.mark.parametrize("output", [True, False])
def test_batched_products_of_activations_fuse(tmp_path, output, second) -> None:
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.qdq(tiny.input(2, 3, 6, 8)), tiny.qdq(tiny.input(2, 3, 8, 5), second))
    found = optimized(tiny.output(tiny.qdq(y, scale=0.3) if output else y), tmp_path, atol=0.301 if output else 1e-4)
    assert found == ({"QLinearMatMul": 1, Q: 2, DQ: 1} if output else {"MatMulIntegerToFloat": 1, Q: 2})


def test_one_float_side_keeps_a_product_float(tmp_path) -> None:
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.qdq(tiny.input(2, 6, 8)), tiny.input(2, 8, 5))
    assert optimized(tiny.output(y), tmp_path) == {"MatMul": 1, Q: 1, DQ: 1}


def test_transposes_may_stand_on_either_side(tmp_path) -> None:
    for behind in (True, False):
        tiny, sides = Tiny(), []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1]):
            x = tiny.input(1, 6, 2, 16)
            sides.append(
                tiny.one("Transpose", tiny.qdq(x), perm=perm)
                if behind
                else tiny.qdq(tiny.one("Transpose", x, perm=perm))
            )
        found = optimized(tiny.output(tiny.one("MatMul", *sides)), tmp_path)
        assert found == {"MatMulIntegerToFloat": 1, "Transpose": 2, Q: 2}


def test_one_dequantized_value_serves_many(tmp_path) -> None:
    """Products, a float operator, and an output of the model; ONNX Runtime copies the DequantizeLinear itself."""
    tiny = Tiny()
    x = tiny.qdq(tiny.input(4, 32))
    products = [tiny.one("MatMul", x, tiny.weight(WEIGHT, 1)) for _ in range(3)]
    found = optimized(tiny.output(*products, tiny.one("Exp", x), x), tmp_path)
    assert found == {"MatMulIntegerToFloat": 3, Q: 1, DQ: 2, "Exp": 1}


def test_one_weight_serves_many(tmp_path) -> None:
    tiny = Tiny()
    weight = tiny.weight(WEIGHT, 1)
    tiny.output(*[tiny.one("MatMul", tiny.qdq(tiny.input(4, 32)), weight) for _ in range(2)])
    assert optimized(tiny, tmp_path) == {"MatMulIntegerToFloat": 2, Q: 2}


@pytest.mark.parametrize("reader", ["Exp", Q, "output"])
def test_a_second_reader_of_an_output_keeps_it_float(tmp_path, reader) -> None:
    tiny = Tiny()
    y = _product(tiny)
    second = {"Exp": lambda: tiny.one("Exp", y), Q: lambda: tiny.qdq(y, scale=0.1), "output": lambda: y}[reader]()
    found = optimized(tiny.output(tiny.qdq(y, scale=0.2), second), tmp_path, atol=0.201)
    assert found["MatMul"] == 1
    assert found[DQ] >= 3


def test_all_readers_behind_one_q_fuse(tmp_path) -> None:
    tiny = Tiny()
    y = tiny.qdq(_product(tiny), scale=0.2)
    found = optimized(tiny.output(tiny.one("Abs", y), tiny.one("Neg", y)), tmp_path, atol=0.201)
    assert found == {"QLinearMatMul": 1, Q: 1, DQ: 2, "Abs": 1, "Neg": 1}


# Shape of the input, of the bias: the operators of product and bias, without a Q behind.
BIASES = [
    ((4, 32), (16,), {"Gemm": 1, Q: 1, DQ: 2}),
    ((2, 4, 32), (16,), {"Gemm": 1, Q: 1, DQ: 2, "Reshape": 2}),
    (("b", "s", 32), (16,), {"MatMulIntegerToFloat": 1, Q: 1, "Add": 1}),
    ((2, 4, 32), (1, 1, 16), {"MatMulIntegerToFloat": 1, Q: 1, "Add": 1}),
    (("b", "s", 32), (1, 1, 16), {"MatMulIntegerToFloat": 1, Q: 1, "Add": 1}),
]


@pytest.mark.parametrize(("shape", "bias", "operators"), BIASES, ids=str)
def test_a_float_bias_can_undo_the_fusion(tmp_path, shape, bias, operators) -> None:
    """MatMul and Add of known shapes become Gemm first, which with a float bias and no Q stays float."""
    tiny = Tiny()
    found = optimized(tiny.output(tiny.one("Add", _product(tiny, *shape), tiny.floats(*bias))), tmp_path)
    assert found == operators


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("shape", [(4, 32), (2, 4, 32)])
def test_an_int32_bias_fuses(tmp_path, shape, output) -> None:
    tiny = Tiny()
    scales = tiny.scales(WEIGHT, 1)
    y = tiny.one("Add", _product(tiny, *shape, scale=scales), tiny.int32_bias(np.float32(STEP) * scales))
    found = optimized(tiny.output(tiny.qdq(y, scale=0.2) if output else y), tmp_path, atol=0.201 if output else 1e-4)
    assert (found["QGemm"], found[Q], found[DQ]) == (1, 1, int(output))


def test_the_scale_of_an_int32_bias_of_a_product_is_not_read(tmp_path) -> None:
    """With another scale than the product's the result is wrong, and nothing says so."""
    tiny = Tiny()
    bias = tiny.int32_bias(np.full(16, 0.01, np.float32))
    tiny.output(tiny.one("Add", _product(tiny), bias))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        optimized(tiny, tmp_path, atol=0.5)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_float_bias_of_a_convolution_fuses(tmp_path, axis) -> None:
    tiny = Tiny()
    inputs = [tiny.qdq(tiny.input(1, 8, 9, 9)), tiny.weight((16, 8, 3, 3), axis), tiny.floats(16)]
    found = optimized(tiny.output(tiny.qdq(tiny.one("Conv", *inputs), scale=0.5)), tmp_path, atol=0.501)
    assert (found["QLinearConv"], found["Conv"], found[DQ]) == (1, 0, 1)


# An operator behind a convolution, zero point of the Q behind it: what the convolution becomes.
BEHIND = [("Relu", 0, "QLinearConv"), ("Relu", 9, "FusedConv"), ("Clip", 0, "QLinearConv")]
BEHIND += [(name, 0, "FusedConv") for name in ("LeakyRelu", "HardSigmoid", "Sigmoid")] + [("HardSwish", 0, "Conv")]


@pytest.mark.parametrize(("operator", "zero", "becomes"), BEHIND)
def test_what_stands_between_a_convolution_and_its_q(tmp_path, operator, zero, becomes) -> None:
    """Relu and Clip vanish where Q cuts at least as much; anything else keeps the convolution float."""
    tiny = Tiny()
    y = tiny.one("Conv", tiny.qdq(tiny.input(1, 8, 9, 9)), tiny.weight((16, 8, 3, 3), 0))
    limits = [tiny.constant(np.float32(limit)) for limit in (0, 6)] if operator == "Clip" else []
    y = tiny.one(operator, y, *limits)
    found = optimized(tiny.output(tiny.qdq(y, scale=6 / 255, zero=zero)), tmp_path, atol=0.024)
    assert found[becomes] == 1
    assert found[DQ] == (1 if becomes == "QLinearConv" else 3)


def test_moved_codes_need_no_pair_of_their_own(tmp_path) -> None:
    """Codes pass through MaxPool in either direction; a Concat stops them."""
    for operator, fused in (("MaxPool", True), ("Concat", False)):
        tiny = Tiny()
        inputs = [tiny.qdq(tiny.input(1, 8, 9, 9)) for _ in range(1 if fused else 2)]
        y = tiny.one(operator, *inputs, **({"kernel_shape": [2, 2]} if fused else {"axis": 1}))
        y = tiny.one("Conv", y, tiny.weight((16, 8 if fused else 16, 3, 3), 0))
        found = optimized(tiny.output(tiny.qdq(y, scale=0.5)), tmp_path, atol=0.501)
        assert (found["QLinearConv"], found["Conv"]) == (int(fused), int(not fused))


def test_function_bodies_fuse(tmp_path) -> None:
    """Inlined at load: x through a quantized product, plus some of its channels through a small float one."""
    tiny = Tiny()
    body = [
        helper.make_node(Q, ["x", "step", "zero"], ["codes"]),
        helper.make_node(DQ, ["codes", "step", "zero"], ["rounded"]),
        helper.make_node(DQ, ["w", "scale", "w_zero"], ["weight"], axis=1),
        helper.make_node("MatMul", ["rounded", "weight"], ["product"]),
        helper.make_node("Gather", ["x", "channels"], ["outliers"], axis=-1),
        helper.make_node("MatMul", ["outliers", "w_float"], ["rest"]),
        helper.make_node("Add", ["product", "rest"], ["y"]),
    ]
    names = ["x", "step", "zero", "w", "scale", "w_zero", "channels", "w_float"]
    domain = [helper.make_opsetid("", 21)]
    tiny.functions.append(helper.make_function("qcompile", "Mixed", names, ["y"], body, domain))
    codes = tiny.random.integers(-127, 128, WEIGHT).astype(np.int8)
    values = [np.float32(STEP), np.uint8(128), codes, tiny.scales(WEIGHT, 1), np.zeros(16, np.int8)]
    inputs = [tiny.input("b", "s", 32), *[tiny.constant(value) for value in (*values, np.array([1, 7, 9]))]]
    tiny.output(tiny.one("Mixed", *inputs, tiny.floats(3, 16), domain="qcompile"))
    assert optimized(tiny, tmp_path) == {Q: 1, "MatMulIntegerToFloat": 1, "Gather": 1, "MatMul": 1, "Add": 1}


@measured
@pytest.mark.parametrize(("axis", "operators"), [(1, {"MatMulNBits": 1}), (0, {DQ: 1, "MatMul": 1})])
def test_weights_alone(tmp_path, axis, operators) -> None:
    """Per column: MatMulNBits, which rounds activations to int8 itself; per row: dequantized in every run."""
    tiny = Tiny()
    tiny.output(tiny.one("MatMul", tiny.input(4, 32), tiny.weight(WEIGHT, axis)))
    assert optimized(tiny, tmp_path, atol=0.3) == operators


# Fused without a check, and refused when it is run.
BAD_WEIGHTS = [{"axis": 0}, {"axis": 0, "block_size": 16, "scale": np.full((2, 16), 0.01, np.float32)}]


@pytest.mark.parametrize("weight", BAD_WEIGHTS, ids=["per row", "in blocks"])
def test_weights_that_fail_when_run(tmp_path, weight) -> None:
    """Beside a quantized activation, a weight may have one scale or one for each column, and no other."""
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.qdq(tiny.input(4, 32)), tiny.weight(WEIGHT, **weight))
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        optimized(tiny.output(y), tmp_path)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 131), (np.int8, 0), (np.int8, 5)])
def test_dynamic_products_fuse_with_their_biases(tmp_path, dtype, zero, readers) -> None:
    tiny, products = Tiny(), []
    codes, scale, zero_point = tiny.op("DynamicQuantizeLinear", [tiny.input("b", "s", 32)], 3)
    for _ in range(readers):
        weight = tiny.random.integers(-120, 120, WEIGHT) + (128 if dtype is np.uint8 else 0)
        inputs = [codes, tiny.constant(weight.astype(dtype)), zero_point, tiny.constant(np.full(16, zero, dtype))]
        sums = tiny.one("Cast", tiny.one("MatMulInteger", *inputs), to=TensorProto.FLOAT)
        y = tiny.one("Mul", sums, tiny.one("Mul", scale, tiny.constant(tiny.scales(WEIGHT, 1))))
        products.append(tiny.one("Add", y, tiny.floats(16)))
    found = optimized(tiny.output(*products), tmp_path)
    many = {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": readers}
    assert found == (many if readers > 1 else {"DynamicQuantizeMatMul": 1})


@measured
def test_float8_is_rounded_and_computed_in_float(tmp_path) -> None:
    tiny = Tiny()
    tiny.constants.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    scale = tiny.constant(np.float32(STEP))
    x = tiny.one(DQ, tiny.one(Q, tiny.input(4, 32), scale, "zero"), scale, "zero")
    values = tiny.random.standard_normal(WEIGHT).ravel().tolist()
    tiny.constants.append(helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, WEIGHT, values))
    tiny.output(tiny.one("MatMul", x, tiny.one(DQ, "w", scale, "zero")))
    assert optimized(tiny, tmp_path) == {Q: 1, DQ: 2, "MatMul": 1}
