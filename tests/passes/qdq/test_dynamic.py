"""passes/qdq/dynamic.py: activations on the range of each batch, found when the model runs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_graphs import Tiny
from qdq_runs import drawn, quantized, session

CLOSE = 0.025


def _products(*shape: int | str, bias: bool = False) -> Tiny:
    """Two products of one value, and one of the first."""
    tiny = Tiny()
    x = tiny.input(*(shape or (4, 32)))
    first, second = (tiny.one("MatMul", x, tiny.floats(32, 32)) for _ in range(2))
    first = tiny.one("Add", first, tiny.floats(32)) if bias else first
    return tiny.output(second, tiny.one("MatMul", first, tiny.floats(32, 8)))


SHAPES = [(4, 32), (2, 4, 32), ("b", "s", 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products_become_integer(tmp_path, shape, bias) -> None:
    made = quantized(_products(*shape, bias=bias), name="dynamic")
    found = made.optimized(tmp_path)
    assert found["MatMul"] == found["Gemm"] == found["Cast"] == found["MatMulInteger"] == 0
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 3
    assert len(made.nodes("DynamicQuantizeLinear")) == 2
    assert 1e-4 < made.error() < CLOSE
    assert made.error(level="ORT_DISABLE_ALL") < CLOSE


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_scales_of_weights(weights, reduce_range) -> None:
    made = quantized(_products(), name="dynamic", weights=weights, reduce_range=reduce_range)
    for node in made.nodes("MatMulInteger"):
        codes, zero = made.array(node.input[1]), made.array(node.input[3])
        assert codes.dtype == zero.dtype == np.int8
        assert not zero.any()
        assert zero.shape == ((codes.shape[1],) if weights == "channel" else ())
        assert np.abs(codes.astype(int)).max() <= (64 if reduce_range else 128)
    assert made.error() < (2 * CLOSE if reduce_range else CLOSE)


def test_the_range_is_that_of_each_batch() -> None:
    """A thousand times larger, the relative error is the same: nothing was learnt from data."""
    tiny = _products()
    proto = onnx.load_from_string(tiny.model())
    feeds = drawn(proto)
    errors = [
        quantized(tiny, [{name: size * x for name, x in feeds.items()}], name="dynamic").error()
        for size in (np.float32(1), np.float32(1000), np.float32(1e-3))
    ]
    np.testing.assert_allclose(errors, errors[0], rtol=0.02)


def test_zeros_and_constants_are_exact() -> None:
    """A batch of zeros has no range."""
    proto = onnx.load_from_string(_products().model())
    (name,) = drawn(proto)
    made = quantized(proto, [{name: np.ones((4, 32), np.float32)}], name="dynamic")
    assert made.error() < CLOSE
    zeros = quantized(proto, [{name: np.zeros((4, 32), np.float32)}, drawn(proto)], name="dynamic")
    for found in session(zeros.after).run(None, zeros.feeds[0]):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize(("operator", "kernel"), [("Conv", (8, 4, 3, 3)), ("ConvTranspose", (4, 8, 3, 3))])
def test_convolutions_have_int8_weights_and_compute_in_float(operator: str, kernel: tuple[int, ...], kind: str) -> None:
    """A channel whose weights are zeros is its bias."""
    tiny, random = Tiny(), np.random.default_rng(0)
    weight, bias = random.normal(size=kernel), np.linspace(-1, 1, 8)
    weight[(3,) if operator == "Conv" else (slice(None), 3)] = 0
    constants = [tiny.constant(array.astype(kind)) for array in (weight, bias)]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    tiny.inputs.append(helper.make_tensor_value_info("x", element, (1, 4, 9, 9)))
    y = tiny.one("Cast", tiny.one(operator, "x", *constants), to=TensorProto.FLOAT)
    made = quantized(tiny.output(y), name="dynamic")
    (told,) = made.decisions("quantized")
    assert told.reason.endswith("weights only")
    assert (told.detail["kind"], told.detail["weights"]) == (operator, weight.size)
    assert len(made.nodes("DequantizeLinear")) == 1
    assert 0 < made.error() < CLOSE
    (found,) = session(made.after).run(None, made.feeds[0])
    np.testing.assert_allclose(found[:, 3], bias[3], rtol=1e-3)


def test_what_the_user_excludes_is_kept() -> None:
    tiny = _products()
    name = tiny.nodes[0].output[0]
    made = quantized(tiny, name="dynamic", recipe={"exclude": (name,)})
    (kept,) = made.decisions("kept")
    assert (kept.node, kept.detail["kind"]) == (name, "MatMul")
    assert len(made.nodes("MatMulInteger")) == 2


def test_a_product_that_is_an_output_keeps_its_name() -> None:
    made = quantized(_products(), name="dynamic")
    for before, after in zip(made.before.graph.output, made.after.graph.output, strict=True):
        assert before.name == after.name
        assert made.producer(after.name).op_type == "Mul"


def test_half_precision_is_cast_around_the_integer_product() -> None:
    """DynamicQuantizeLinear takes float32 only."""
    tiny = Tiny()
    tiny.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT16, (4, 32)))
    y = tiny.one("MatMul", "x", tiny.constant(tiny.random.standard_normal((32, 16)).astype("f2")))
    tiny.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT16, (4, 16)))
    made = quantized(onnx.load_from_string(tiny.model()), name="dynamic")
    assert made.decisions("quantized")
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {node.op_type for node in made.after.graph.node}
    assert 0 < made.error() < 0.03


def test_two_runs_give_the_same_bytes() -> None:
    first, second = (quantized(_products(), name="dynamic").after.SerializeToString(deterministic=True) for _ in "ab")
    assert first == second
