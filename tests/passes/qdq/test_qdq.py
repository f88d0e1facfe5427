"""passes/qdq/qdq.py: where Q and DQ go in small graphs, what ONNX Runtime makes of them, how far the outputs move."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_graphs import Tiny
from qdq_runs import DQ, Made, Q, drawn, quantized, redundant_pairs, session

# Relative error of an 8-bit product of normal numbers on exact extremes: some 5 standard deviations in 255 steps.
CLOSE = 0.025


def _linear(*shape: int | str, bias: tuple[int, ...] | None = None) -> Tiny:
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.input(*shape), tiny.floats(32, 16))
    return tiny.output(tiny.one("Add", y, tiny.floats(*bias)) if bias else y)


def _conv(tiny: Tiny, x: str, channels: int = 8, out: int = 16, **attributes) -> str:
    weight, bias = tiny.floats(out, channels, 3, 3), tiny.floats(out)
    return tiny.one("Conv", x, weight, bias, pads=[1, 1, 1, 1], **attributes)


def _relu() -> Tiny:
    tiny = Tiny()
    first = tiny.one("Relu", _conv(tiny, tiny.input(1, 8, 9, 9)))
    return tiny.output(tiny.one("Relu", _conv(tiny, first, 16)))


def _clip() -> Tiny:
    tiny = Tiny()
    low, high = tiny.constant(np.float32(0)), tiny.constant(np.float32(6))
    first = tiny.one("Clip", _conv(tiny, tiny.input(1, 8, 9, 9)), low, high)
    return tiny.output(_conv(tiny, first, 16))


def _hard_swish() -> Tiny:
    tiny = Tiny()
    first = tiny.one("HardSwish", _conv(tiny, tiny.input(1, 8, 9, 9)))
    return tiny.output(_conv(tiny, first, 16))


def _residual() -> Tiny:
    """Conv, Conv, and the first one's output added: what a ResNet is made of."""
    tiny = Tiny()
    first = tiny.one("Relu", _conv(tiny, tiny.input(1, 8, 9, 9)))
    total = tiny.one("Add", _conv(tiny, first, 16), first)
    return tiny.output(_conv(tiny, tiny.one("Relu", total), 16))


def _concat() -> Tiny:
    tiny = Tiny()
    x = tiny.input(1, 8, 9, 9)
    joined = tiny.one("Concat", _conv(tiny, x), _conv(tiny, x), axis=1)
    return tiny.output(_conv(tiny, joined, 32))


def _moves() -> Tiny:
    tiny = Tiny()
    first = _conv(tiny, tiny.input(1, 8, 8, 8))
    pooled = tiny.one("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2])
    turned = tiny.one("Transpose", pooled, perm=[0, 1, 3, 2])
    return tiny.output(_conv(tiny, turned, 16))


def _clamped(*shape: int, bias: bool = False, gemm: bool = False, operator: str = "Relu") -> Tiny:
    """A product, maybe with a bias, and a Relu or Clip that a float operator reads."""
    tiny = Tiny()
    x, weight = tiny.input(*shape), tiny.floats(32, 16)
    if gemm:
        y = tiny.one("Gemm", x, weight, tiny.floats(16))
    else:
        y = tiny.one("MatMul", x, weight)
        y = tiny.one("Add", y, tiny.floats(16)) if bias else y
    limits = [tiny.constant(np.float32(0)), tiny.constant(np.float32(6))] if operator == "Clip" else []
    return tiny.output(tiny.one("Sqrt", tiny.one(operator, y, *limits)))


def _gemm() -> Tiny:
    tiny = Tiny()
    x, weight, bias = tiny.input(4, 32), tiny.floats(16, 32), tiny.floats(16)
    return tiny.output(tiny.one("Gemm", x, weight, bias, transB=1))


# What is written, and operators of the optimized graph.
GRAPHS: dict[str, tuple[Callable[[], Tiny], dict[str, int]]] = {
    "rank 2": (lambda: _linear(4, 32), {"MatMulIntegerToFloat": 1, Q: 1}),
    "rank 3": (lambda: _linear(2, 4, 32), {"MatMulIntegerToFloat": 1, Q: 1}),
    "symbolic": (lambda: _linear("b", "s", 32), {"MatMulIntegerToFloat": 1, Q: 1}),
    "rank 2 with a bias": (lambda: _linear(4, 32, bias=(16,)), {"QGemm": 1, Q: 1}),
    "rank 3 with a bias": (lambda: _linear(2, 4, 32, bias=(16,)), {"MatMulIntegerToFloat": 1, Q: 1, "Add": 1}),
    "symbolic with a bias": (lambda: _linear("b", "s", 32, bias=(16,)), {"MatMulIntegerToFloat": 1, Q: 1, "Add": 1}),
    "Gemm": (_gemm, {"QGemm": 1, Q: 1}),
    "Relu": (_relu, {"QLinearConv": 2, Q: 1, DQ: 1}),
    "Clip": (_clip, {"QLinearConv": 2, Q: 1, DQ: 1}),
    "HardSwish": (_hard_swish, {"QLinearConv": 2, "HardSigmoid": 1, "Mul": 1, Q: 2, DQ: 2}),
    "residual": (_residual, {"QLinearConv": 3, "QLinearAdd": 1, Q: 1, DQ: 1}),
    "Concat": (_concat, {"QLinearConv": 3, "Concat": 1, Q: 1, DQ: 1}),
    "MatMul and Relu": (lambda: _clamped(4, 32), {"QLinearMatMul": 1, "Sqrt": 1, Q: 1, DQ: 1}),
    "MatMul and Clip": (lambda: _clamped(2, 4, 32, operator="Clip"), {"QLinearMatMul": 1, "Sqrt": 1, Q: 1, DQ: 1}),
    "MatMul, bias and Relu": (lambda: _clamped(4, 32, bias=True), {"QGemm": 1, "Sqrt": 1, Q: 1, DQ: 1}),
    "bias and Relu, rank 3": (
        lambda: _clamped(2, 4, 32, bias=True),
        {"MatMulIntegerToFloat": 1, "Add": 1, "Relu": 1, "Sqrt": 1, Q: 1},
    ),
    "Gemm and Relu": (lambda: _clamped(4, 32, gemm=True), {"QGemm": 1, "Sqrt": 1, Q: 1, DQ: 1}),
    "moves": (_moves, {"QLinearConv": 2, "MaxPool": 1, "Transpose": 1, Q: 1, DQ: 1}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_products_become_integer(tmp_path, name) -> None:
    make, operators = GRAPHS[name]
    made = quantized(make())
    found = made.optimized(tmp_path)
    found["Concat"] += found.pop("QLinearConcat", 0)
    assert +found == operators
    assert redundant_pairs(made.after) == []


@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_stay_close(name) -> None:
    made = quantized(GRAPHS[name][0]())
    assert 1e-4 < made.error(level="ORT_DISABLE_ALL") < CLOSE
    assert 1e-4 < made.error() < CLOSE


@pytest.mark.parametrize("name", GRAPHS)
def test_names_of_inputs_and_outputs_stay(name) -> None:
    made = quantized(GRAPHS[name][0]())
    for side in ("input", "output"):
        before, after = ([value.name for value in getattr(proto.graph, side)] for proto in (made.before, made.after))
        assert before == after


@pytest.mark.parametrize("name", ["residual", "rank 2 with a bias", "moves"])
def test_two_runs_give_the_same_bytes(name) -> None:
    first, second = (quantized(GRAPHS[name][0]()).after.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_bias_of_static_rank_3_becomes_a_row() -> None:
    made = quantized(_linear(2, 4, 32, bias=(16,)))
    (add,) = made.nodes("Add")
    assert [made.array(name).shape for name in add.input if "row" in name] == [(1, 1, 16)]


def _int32(made: Made, operator: str) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """(bias codes, bias scale, activation scale, weight scale) of the first product."""
    product = made.nodes(operator)[0]
    x, w, b = (made.producer(name) for name in product.input)
    assert (x.op_type, w.op_type, b.op_type) == (DQ, DQ, DQ)
    return made.array(b.input[0]), made.array(b.input[1]), float(made.array(x.input[1])), made.array(w.input[1])


@pytest.mark.parametrize(("name", "operator"), [("Relu", "Conv"), ("Gemm", "Gemm"), ("rank 2 with a bias", "Gemm")])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_biases_are_int32_of_the_products_scale(name, operator, weights) -> None:
    made = quantized(GRAPHS[name][0](), weights=weights)
    codes, scale, activation, weight = _int32(made, operator)
    assert codes.dtype == np.int32
    np.testing.assert_allclose(scale, np.broadcast_to(activation * weight, codes.shape), rtol=1e-6)
    bias = next(t for t in made.before.graph.initializer if list(t.dims) == [16])
    np.testing.assert_allclose(codes * scale, onnx.numpy_helper.to_array(bias), atol=float(scale.max()) / 2 * 1.001)


@pytest.mark.parametrize("operator", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_channels_that_are_dead_but_for_their_bias(tmp_path, operator, weights) -> None:
    """Their bias is beyond 32 bits in units of the sums' scale, and ONNX Runtime would clip even a float one."""
    tiny = Tiny()
    shape, axis = {"Conv": ((16, 8, 3, 3), 0), "Gemm": ((32, 16), 1), "MatMul": ((32, 16), 1)}[operator]
    array = tiny.random.standard_normal(shape).astype("f")
    np.moveaxis(array, axis, 0)[:4] *= np.float32(1e-9)
    if weights == "tensor":
        array *= np.float32(1e-9)
    weight, bias = tiny.constant(array), tiny.constant(tiny.random.uniform(5, 9, 16).astype("f"))
    x = tiny.input(*((1, 8, 9, 9) if operator == "Conv" else (4, 32)))
    y = (
        tiny.one("Add", tiny.one("MatMul", x, weight), bias)
        if operator == "MatMul"
        else tiny.one(operator, x, weight, bias)
    )
    y = tiny.one("Relu", y)
    last = tiny.floats(4, 16, 3, 3) if operator == "Conv" else tiny.floats(16, 4)
    made = quantized(tiny.output(tiny.one("Conv" if operator == "Conv" else "MatMul", y, last)), weights=weights)
    assert made.error(level="ORT_DISABLE_ALL") < CLOSE
    assert made.error() < CLOSE
    found = made.optimized(tmp_path)
    assert found["Conv"] == found["FusedConv"] == found["Gemm"] == found["FusedGemm"] == found["MatMul"] == 0


def test_a_shared_weight_has_other_scales_for_a_bias_that_needs_them() -> None:
    tiny = Tiny()
    x, weight = tiny.input(4, 32), tiny.constant(np.full((32, 16), 1e-9, np.float32))
    large, small = tiny.constant(np.full(16, 5, np.float32)), tiny.constant(np.full(16, 1e-9, np.float32))
    made = quantized(tiny.output(*(tiny.one("Gemm", x, weight, bias) for bias in (small, large, small))))
    stored = [t for t in made.after.graph.initializer if list(t.dims) == [32, 16]]
    assert len(stored) == 2
    assert made.error() < CLOSE


def test_a_concat_and_its_inputs_share_a_scale() -> None:
    """One of them ten times as wide as the other."""
    tiny = Tiny()
    x = tiny.input(1, 8, 9, 9)
    wide = tiny.one("Conv", x, tiny.constant(10 * tiny.random.standard_normal((8, 8, 3, 3)).astype("f")))
    narrow = tiny.one("Conv", x, tiny.floats(8, 8, 3, 3))
    joined = tiny.one("Concat", wide, narrow, axis=1)
    made = quantized(tiny.output(tiny.one("Conv", joined, tiny.floats(4, 16, 3, 3))))
    grids = {made.grid(name) for name in (wide, narrow, joined)}
    assert len(grids) == 1
    assert made.grid(x) not in grids


def test_a_narrow_input_of_a_concat_that_others_read_keeps_its_own_scale() -> None:
    """x and 100 x beside each other: on the grid of both nothing was left of x for the product by 100."""
    tiny = Tiny()
    narrow = _conv(tiny, tiny.input(1, 8, 9, 9))
    wide = tiny.one("Mul", narrow, tiny.constant(np.float32(100)))
    joined = tiny.one("Concat", narrow, wide, axis=1)
    made = quantized(tiny.output(_conv(tiny, joined, 32)), operators="all")
    assert made.grid(joined) == made.grid(wide) != made.grid(narrow)
    assert made.error() < 2 * CLOSE


def test_nor_does_one_whose_scale_goes_through_a_move() -> None:
    """Half of a product beside a thousand times the other half: Split gives both the product's own scale."""
    tiny = Tiny()
    product = _conv(tiny, tiny.input(1, 8, 9, 9))
    first, second = tiny.op("Split", [product], 2, axis=1, num_outputs=2)
    wide = tiny.one("Mul", second, tiny.constant(np.float32(1000)))
    joined = tiny.one("Concat", first, wide, axis=1)
    made = quantized(tiny.output(_conv(tiny, joined, 16)), operators="all")
    assert made.grid(product) != made.grid(wide)
    assert made.error() < 2 * CLOSE


@pytest.mark.parametrize("share", [False, True])
def test_inputs_of_a_sum_share_a_scale_if_asked(share) -> None:
    made = quantized(_residual(), share_sums=share)
    (add,) = made.nodes("Add")
    scales = [float(made.array(made.producer(name).input[1])) for name in add.input]
    assert (scales[0] == scales[1]) is share
    assert made.error() < (4 * CLOSE if share else CLOSE)  # one input is far wider than the other


def test_the_code_of_zero_is_the_lowest_behind_relu() -> None:
    made = quantized(_relu())
    relus = [made.grid(node.output[0]) for node in made.nodes("Relu")]
    assert len(relus) == 2
    assert all(zero == 0 for _, zero, _ in relus)


def test_a_float_reader_and_an_integer_one_of_an_input() -> None:
    """Exp reads what came in, not its codes: an input need not be rounded for it."""
    tiny = Tiny()
    x = tiny.input(4, 32)
    y, z = tiny.one("MatMul", x, tiny.floats(32, 16)), tiny.one("Exp", x)
    made = quantized(tiny.output(y, z))
    assert made.nodes("Exp")[0].input[0] == x
    assert made.producer(made.nodes("MatMul")[0].input[0]).op_type == DQ


def test_a_float_reader_behind_a_convolution_reads_its_codes(tmp_path) -> None:
    """A second reader of its output would keep the Conv float."""
    tiny = Tiny()
    first = _conv(tiny, tiny.input(1, 8, 9, 9))
    made = quantized(tiny.output(_conv(tiny, first, 16), tiny.one("Exp", first)))
    assert made.producer(made.nodes("Exp")[0].input[0]).op_type == DQ
    assert made.optimized(tmp_path)["QLinearConv"] == 2


def test_an_output_that_is_quantized_keeps_its_name(tmp_path) -> None:
    tiny = Tiny()
    first = _conv(tiny, tiny.input(1, 8, 9, 9))
    made = quantized(tiny.output(first, _conv(tiny, first, 16)))
    assert made.producer(first).op_type == DQ
    assert made.optimized(tmp_path)["QLinearConv"] == 2
    assert made.error() < CLOSE


def test_an_input_that_is_an_output_too() -> None:
    tiny = Tiny()
    x = tiny.input(4, 32)
    made = quantized(tiny.output(tiny.one("MatMul", x, tiny.floats(32, 16)), tiny.one("Identity", x)))
    assert made.nodes("Identity")[0].input[0] == x
    assert made.error() < CLOSE


def _subgraph() -> onnx.ModelProto:
    """A Conv whose output and weight are read inside both branches of an If."""
    tiny = Tiny()
    x = tiny.input(1, 8, 9, 9)
    first = _conv(tiny, x)
    weight = tiny.floats(16, 16, 3, 3)
    y = _conv(tiny, first, 16)

    def branch(name: str, operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node(operator, [first], [f"{name}.y"]),
            helper.make_node("Conv", [f"{name}.y", weight], [f"{name}.z"], name=f"{name}.conv"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}.z", TensorProto.FLOAT, None)])

    condition = tiny.one("Greater", tiny.one("ReduceSum", x, keepdims=0), tiny.constant(np.float32(0)))
    z = tiny.one("If", condition, then_branch=branch("then", "Abs"), else_branch=branch("else", "Neg"))
    return onnx.load_from_string(tiny.output(y, z).model())


def test_values_read_inside_a_branch() -> None:
    made = quantized(_subgraph())
    assert made.error() < CLOSE
    (choice,) = made.nodes("If")
    inner = [node for attribute in choice.attribute for node in attribute.g.node]
    assert len(inner) == 4


def test_the_opset_that_16_bits_need() -> None:
    tiny = _linear(4, 32)
    for kind in ("uint16", "int16", "float8"):
        made = quantized(tiny, activations=kind)
        assert next(o.version for o in made.after.opset_import if not o.domain) >= 21
        session(made.after)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("kind", ["int8", "uint16", "int16", "float8"])
def test_other_types_give_the_same_with_and_without_optimizations(name, kind) -> None:
    """Of float8, ONNX Runtime once dropped the Relu before a QuantizeLinear with a zero point, and refused a Clip."""
    made = quantized(GRAPHS[name][0](), activations=kind)
    plain = made.error(level="ORT_DISABLE_ALL")
    assert plain < (0.1 if kind == "float8" else CLOSE)
    # Weights beside float activations are read by MatMulNBits, which rounds activations to int8 of its own.
    assert made.error() < 2 * plain


def test_an_empty_graph_is_left_alone() -> None:
    tiny = Tiny()
    made = quantized(tiny.output(tiny.one("Exp", tiny.input(4, 32))))
    assert [node.op_type for node in made.after.graph.node] == ["Exp"]
    assert made.made.decisions == []


def test_onnxruntime_may_rewrite_what_is_made_for_its_cpu_provider_alone() -> None:
    for provider in ("cpu", "tensorrt"):
        tiny = Tiny()
        y = tiny.one("MatMul", tiny.input(4, 32), tiny.constant(tiny.random.standard_normal((32, 16)).astype("f4")))
        made = quantized(tiny.output(y), provider=provider).made
        assert made.fused is (provider == "cpu")


def test_half_precision(tmp_path) -> None:
    """Scales are stored in float16; ranges too small for that must not become 0."""
    for factor in (1.0, 1e-4, 1e3):
        tiny = Tiny()
        tiny.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT16, (4, 32)))
        y = tiny.one("MatMul", "x", tiny.constant(tiny.random.standard_normal((32, 16)).astype("f2")))
        tiny.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT16, (4, 16)))
        proto = onnx.load_from_string(tiny.model())
        feeds = [{"x": (factor * drawn(proto, seed)["x"]).astype("f2")} for seed in range(3)]
        for kind in ("auto", "uint16"):
            made = quantized(proto, feeds, activations=kind)
            assert made.error() < CLOSE
