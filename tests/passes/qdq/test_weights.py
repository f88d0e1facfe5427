"""passes/qdq/weights.py and the types of qdq: codes and scales of weights, grids of activations, tables stored once."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from qdq_graphs import Tiny
from qdq_runs import Made, Q, quantized

from qcompile.passes.errors import UserError
from qcompile.passes.qdq.weights import WeightGrid, importance, quantize_weight

CLOSE = 0.025


@st.composite
def weights(draw) -> tuple[np.ndarray, int]:
    """(weight of rank 2 to 4, channel axis): zeros, denormals and powers of ten apart in one channel or another."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    seed, low, high = draw(st.integers(0, 2**32 - 1)), draw(st.integers(-30, 20)), draw(st.integers(0, 16))
    random = np.random.default_rng(seed)
    w = random.standard_normal(shape) * 10.0 ** random.integers(low, low + high, shape, endpoint=True)
    w[random.random(shape) < draw(st.sampled_from([0, 0.5, 1]))] = 0
    return w.astype(np.float32), axis


@settings(deadline=None, max_examples=200)
@given(weights(), st.booleans(), st.booleans())
def test_codes_are_the_nearest(weight, per_channel, reduce_range) -> None:
    w, axis = weight
    codes = quantize_weight(w, axis, WeightGrid(per_channel, reduce_range))
    assert codes.codes.dtype == np.int8
    assert codes.codes.shape == w.shape
    assert codes.scale.shape == ((w.shape[axis],) if per_channel else ())
    assert (codes.scale > 0).all()
    low, high = (-64, 64) if reduce_range else (-128, 127)
    assert low <= codes.codes.min() <= codes.codes.max() <= high
    shape = [1] * w.ndim
    shape[axis] = -1
    scale = np.broadcast_to(codes.scale.reshape(shape) if per_channel else codes.scale, w.shape)
    # A scale is rounded to float16 where that changes it by 2^-9 at most, so that ends lie up to 1/4 of a step out.
    allowed = scale * (0.5 + 128 / 2**9) * (1 + 1e-5)
    allowed = np.where((scale == 1) & (np.abs(w) < 1e-9), np.abs(w), allowed)  # next to nothing is nothing
    assert (np.abs(codes.dequantize() - w) <= allowed).all()
    np.testing.assert_array_equal(codes.dequantize()[w == 0], 0)


@settings(deadline=None, max_examples=100)
@given(weights(), st.booleans())
def test_float8_codes_are_the_nearest(weight, per_channel) -> None:
    """Three bits of mantissa: half a step is 2^-4 of a number, or 2^-10 of the scale among the smallest."""
    w, axis = weight
    codes = quantize_weight(w, axis, WeightGrid(per_channel, float8=True))
    assert codes.codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.isfinite(codes.codes.astype(np.float32)).all()
    shape = [1] * w.ndim
    shape[axis] = -1
    scale = codes.scale.reshape(shape) if per_channel else codes.scale
    allowed = np.maximum(np.abs(w) * 2**-4, scale * 2**-10) * (1 + 1e-3)
    lost = (scale == 1) & (np.abs(w) < 2**-9)  # a channel of numbers below 1e-12 may have scale 1
    assert (np.abs(codes.dequantize() - w) <= np.where(lost, np.abs(w) + 1e-30, allowed)).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_importance_is_relative_at_any_size(size) -> None:
    """Squares of 1e30 are none in float32; only the ratios count."""
    w = np.arange(1, 5, dtype=np.float32)[:, None] * np.float32(size)
    tiny = Tiny()
    tiny.output(tiny.one("MatMul", tiny.input(2, 4), tiny.constant(w)))
    model = ir.from_proto(onnx.load_from_string(tiny.model()))
    np.testing.assert_allclose(importance(list(model.graph)), np.arange(1, 5) ** 2 / 16, rtol=1e-5)


def test_importance_of_a_convolution_is_by_channels_of_its_groups() -> None:
    """w (outputs, channels of a group, kernel): channel c of group g meets the outputs of the group alone."""
    w, tiny = np.random.default_rng(0).standard_normal((6, 2, 3, 1)).astype(np.float32), Tiny()
    tiny.output(tiny.one("Conv", tiny.input(1, 4, 8, 8), tiny.constant(w), group=2))
    power = np.array([np.square(w[3 * g : 3 * g + 3, c]).sum() for g in range(2) for c in range(2)])
    found = importance(list(ir.from_proto(onnx.load_from_string(tiny.model())).graph))
    np.testing.assert_allclose(found, (power / power.max()).reshape(4, 1, 1), rtol=1e-5)


def test_the_scale_of_zeros_and_of_a_number() -> None:
    """A channel's scale is that of the end which needs the larger one: -4 is code -128, 127 is code 127."""
    w = np.array([[0, -4, 127], [0, 2, 0]], np.float32)
    codes = quantize_weight(w, 1, WeightGrid())
    np.testing.assert_array_equal(codes.scale, [1, 4 / 128, 1])
    np.testing.assert_array_equal(codes.codes, [[0, -128, 127], [0, 64, 0]])
    assert quantize_weight(w, 1, WeightGrid(per_channel=False)).scale == 1


def test_reduced_codes_are_half_as_large() -> None:
    w = np.random.default_rng(0).standard_normal((64, 8)).astype("f")
    full, reduced = (quantize_weight(w, 1, WeightGrid(reduce_range=own)) for own in (False, True))
    assert ((full.codes.min(axis=0) == -128) | (full.codes.max(axis=0) == 127)).all()
    assert ((reduced.codes.min(axis=0) == -64) | np.isin(reduced.codes.max(axis=0), (63, 64))).all()
    np.testing.assert_allclose(reduced.scale, 2 * full.scale)


def _convs(tiny: Tiny | None = None) -> Tiny:
    tiny = tiny or Tiny()
    first = tiny.one("Conv", tiny.input(1, 8, 9, 9), tiny.floats(16, 8, 3, 3), tiny.floats(16))
    y = tiny.one("Reshape", tiny.one("Relu", first), tiny.constant(np.array([1, -1])))
    return tiny.output(tiny.one("MatMul", y, tiny.floats(16 * 49, 4)))


def _weight_readers(made: Made) -> list[onnx.NodeProto]:
    constants = {t.name for t in made.after.graph.initializer}
    return [n for n in made.nodes("DequantizeLinear") if n.input[0] in constants and "int32" not in n.input[0]]


@pytest.mark.parametrize(("weights", "shapes"), [("channel", [(4,), (16,)]), ("tensor", [(), ()])])
def test_scales_of_weights(weights, shapes) -> None:
    made = quantized(_convs(), weights=weights)
    readers = _weight_readers(made)
    assert sorted(made.array(n.input[1]).shape for n in readers) == shapes
    axes = {a.i for n in readers for a in n.attribute if a.name == "axis"}
    assert axes == ({0, 1} if weights == "channel" else set())
    assert made.error() < CLOSE


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16", "float8"])
@pytest.mark.parametrize("symmetric", ["auto", True])
def test_types_of_activations(kind, symmetric) -> None:
    made = quantized(_convs(), activations=kind, symmetric=symmetric)
    if kind == "float8":
        assert {helper.get_node_attr_value(n, "output_dtype") for n in made.nodes(Q)} == {TensorProto.FLOAT8E4M3FN}
    else:
        assert {made.array(n.input[2]).dtype for n in made.nodes(Q)} == {np.dtype(kind)}
        zeros = {float(made.array(n.input[2])) for n in made.nodes(Q)}
        even = {"uint8": 128, "int8": 0, "uint16": 32768, "int16": 0}[kind]
        assert (zeros == {even}) is (symmetric is True)
    assert all(made.array(n.input[1]) > 0 for n in made.nodes(Q))
    limit = 0.08 if kind == "float8" else CLOSE
    assert made.error() < limit


def test_16_bits_are_finer_than_8_and_8_than_float8() -> None:
    errors = {kind: quantized(_convs(), activations=kind).error() for kind in ("uint8", "int8", "uint16", "float8")}
    assert errors["uint16"] < min(errors["uint8"], errors["int8"])
    assert 2 * max(errors["uint8"], errors["int8"]) < errors["float8"]


def test_float8_weights_are_stored_as_such() -> None:
    made = quantized(_convs(), activations="float8")
    assert {made.array(n.input[0]).dtype for n in _weight_readers(made)} == {np.dtype(ml_dtypes.float8_e4m3fn)}
    (reason,) = {d.reason for d in made.decisions("quantized") if d.detail["weights"]}
    assert reason == "float8 per channel static, float8e4m3fn sym"


@pytest.mark.parametrize("operators", ["auto", "weights", "all"])
def test_tensorrt_is_int8_around_zero(operators) -> None:
    """Zero points 0, codes int8, scales positive, biases float."""
    made = quantized(_convs(), provider="tensorrt", operators=operators)
    for node in (*made.nodes(Q), *made.nodes("DequantizeLinear")):
        assert (made.array(node.input[1]) > 0).all()
        if len(node.input) > 2:
            zero = made.array(node.input[2])
            assert zero.dtype == np.int8
            assert not zero.any()
    stored = {made.array(n.input[0]).dtype for n in _weight_readers(made)}
    assert stored == {np.dtype(np.int8)}
    assert made.producer(made.nodes("Conv")[0].input[2]) is None
    assert made.error() < 2 * CLOSE


REFUSED = {
    "asymmetric": ({"provider": "tensorrt", "symmetric": False}, "tensorrt takes symmetric activations only"),
    "unsigned": (
        {"provider": "tensorrt", "activations": "uint8"},
        "tensorrt takes int8 and float8 activations, got uint8",
    ),
    "wide": ({"provider": "tensorrt", "activations": "int16"}, "tensorrt takes int8 and float8 activations, got int16"),
    "cuda": ({"provider": "cuda", "symmetric": False}, "cuda takes symmetric activations only"),
    "float8": ({"activations": "float8", "symmetric": False}, "float8 activations are symmetric"),
    "unknown": ({"activations": "int4"}, "parameter activations takes 'auto' or 'uint8'"),
    "observer": ({"observer": "gram"}, "parameter observer takes .*, got 'gram'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_types_are_refused(name) -> None:
    parameters, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        quantized(_convs(), **parameters)


def _half(tiny: Tiny, weight: np.ndarray, rows: int = 4) -> onnx.ModelProto:
    tiny.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT16, (rows, weight.shape[0])))
    y = tiny.one("MatMul", "x", tiny.constant(weight))
    tiny.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT16, (rows, weight.shape[1])))
    return onnx.load_from_string(tiny.model())


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-4])
def test_half_precision_weights_fit_their_scales(size) -> None:
    """What float16 makes of a small scale is what codes are chosen for."""
    w = (size * np.random.default_rng(0).standard_normal((32, 16))).astype("f2")
    made = quantized(_half(Tiny(), w), recipe={})
    (reader,) = _weight_readers(made)
    scale = made.array(reader.input[1])
    assert scale.dtype == np.float16
    w_hat = made.array(reader.input[0]) * scale.astype("f")
    # Near its smallest number, 2^-24, a float16 scale is rounded by half of that.
    assert (np.abs(w_hat - w.astype("f")) <= 0.501 * scale.astype("f") + 128 * 2.0**-25).all()
    assert np.linalg.norm(w_hat - w) < 0.02 * np.linalg.norm(w.astype("f"))


def _tied() -> Tiny:
    """An embedding whose table is the output projection, too, behind a product of its own."""
    tiny = Tiny()
    table = tiny.floats(64, 32)
    tiny.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, (1, 5)))
    hidden = tiny.one("MatMul", tiny.one("Gather", table, "ids"), tiny.floats(32, 32))
    return tiny.output(tiny.one("MatMul", hidden, tiny.one("Transpose", table, perm=[1, 0])))


@pytest.mark.parametrize("name", ["qdq", "dynamic"])
def test_tied_tables_have_the_same_bytes(name) -> None:
    """Stored once on disk, where equal bytes are."""
    made = quantized(_tied(), name=name)
    tables = [t for t in made.after.graph.initializer if sorted(t.dims) == [32, 64]]
    assert len(tables) == 2
    assert len({t.raw_data for t in tables}) == 1
    assert {tuple(t.dims) for t in tables} == {(32, 64)}
    assert made.error() < 2 * CLOSE
    assert [d.detail["kind"] for d in made.decisions("quantized")] == ["MatMul", "MatMul", "Gather"]


def test_a_table_beside_float8_weights_is_int8() -> None:
    made = quantized(_tied(), activations="float8")
    (lookup,) = made.nodes("EmbeddingInt8")
    assert made.array(lookup.input[1]).dtype == np.int8
    assert made.error() < 0.12


@pytest.mark.parametrize("name", ["qdq", "dynamic"])
def test_a_table_of_one_scale_is_looked_up_by_it(name) -> None:
    """Of the largest weight of the table: every row has it, as EmbeddingInt8 wants one for each. Scales are halves."""
    tiny = Tiny()
    table = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    table[7, 3] = 8
    tiny.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, (1, 5)))
    rows = tiny.one("Gather", tiny.constant(table), "ids")
    made = quantized(tiny.output(tiny.one("MatMul", rows, tiny.floats(32, 16))), name=name, weights="tensor")
    (lookup,) = made.nodes("EmbeddingInt8")
    codes, scale, zero_point = (made.array(own) for own in lookup.input[1:4])
    assert codes.shape == (32, 64)
    step = np.float32(np.float16(8 / 127))
    np.testing.assert_array_equal(scale, np.full((1, 64), step))
    np.testing.assert_array_equal(zero_point, np.zeros((1, 64)))
    np.testing.assert_array_equal(codes, np.rint(table.T / step))


def test_one_weight_of_two_products_is_stored_once(tmp_path) -> None:
    tiny = Tiny()
    weight = tiny.floats(32, 16)
    made = quantized(tiny.output(*(tiny.one("MatMul", tiny.input(4, 32), weight) for _ in range(2))))
    assert len([t for t in made.after.graph.initializer if list(t.dims) == [32, 16]]) == 1
    assert made.optimized(tmp_path)["MatMulIntegerToFloat"] == 2


def test_one_weight_read_both_ways_round() -> None:
    tiny = Tiny()
    weight = tiny.floats(32, 32)
    x = tiny.input(4, 32)
    turned = tiny.one("Transpose", weight, perm=[1, 0])
    made = quantized(tiny.output(tiny.one("MatMul", x, weight), tiny.one("MatMul", x, turned)))
    assert made.error() < CLOSE
