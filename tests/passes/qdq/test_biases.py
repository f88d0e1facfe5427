"""Biases under qdq: what a channel of dead weights gives is its bias, and one number is the bias of every channel."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from preparing import parse
from qdq_graphs import Tiny
from qdq_runs import DQ, Made, quantized, session

from qcompile.passes.qdq.biases import bias_behind, channel_bias
from qcompile.passes.qdq.weights import WeightGrid, quantize_weight

CHANNELS = 12
# Weights of dead channels: none, or so small that nothing of them shows beside a bias.
DEAD = (0.0, 1e-38, 1e-20, 1e-9)


def _weights(seed: int, dead: list[float]) -> np.ndarray:
    """(CHANNELS, 4, 3, 3); the first channels are dead ones."""
    w = np.random.default_rng(seed).standard_normal((CHANNELS, 4, 3, 3)).astype(np.float32)
    for channel, size in enumerate(dead):
        w[channel] *= np.float32(size)
    return w


def _conv(w: np.ndarray, bias: np.ndarray) -> Tiny:
    tiny = Tiny()
    y = tiny.one("Conv", tiny.input(2, 4, 6, 6), tiny.constant(w), tiny.constant(bias))
    return tiny.output(y)


def _gemm(w: np.ndarray, bias: np.ndarray) -> Tiny:
    tiny = Tiny()
    x, flat = tiny.input(16, flat_size(w)), tiny.constant(w.reshape(len(w), -1))
    return tiny.output(tiny.one("Gemm", x, flat, tiny.constant(bias), transB=1))


def _matmul(w: np.ndarray, bias: np.ndarray) -> Tiny:
    tiny = Tiny()
    x, flat = tiny.input(16, flat_size(w)), tiny.constant(np.ascontiguousarray(w.reshape(len(w), -1).T))
    return tiny.output(tiny.one("Add", tiny.one("MatMul", x, flat), tiny.constant(bias)))


def flat_size(w: np.ndarray) -> int:
    return int(np.prod(w.shape[1:]))


@settings(deadline=None, max_examples=40)
@given(
    build=st.sampled_from([_conv, _gemm, _matmul]),
    seed=st.integers(0, 2**16),
    dead=st.lists(st.sampled_from(DEAD), min_size=1, max_size=6),
    size=st.integers(-6, 6),
    scale=st.integers(-4, 4),
    weights=st.sampled_from(["channel", "tensor"]),
    provider=st.sampled_from(["cpu", "tensorrt"]),
)
def test_a_dead_channel_is_its_bias(build, seed, dead, size, scale, weights, provider) -> None:
    """Within a step of the output's own grid, with ONNX Runtime's optimizations and without."""
    random, w = np.random.default_rng(seed), _weights(seed, dead)
    bias = (random.standard_normal(CHANNELS) * 10.0**size).astype(np.float32)
    feeds = [{"x1": np.float32(10.0**scale) * random.standard_normal(shape(build, w)).astype(np.float32)}]
    made = quantized(build(w, bias), feeds, weights=weights, provider=provider)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        wanted, found = _both(made, level)
        axes = tuple(i for i in range(wanted.ndim) if i != 1)
        off = np.abs(found - wanted).max(axis=axes)[: len(dead)]
        assert (off <= 1.01 * np.ptp(wanted) / 127 + 0.01 * np.abs(bias[: len(dead)])).all()
    _check_scales(made)


def shape(build: Any, w: np.ndarray) -> tuple[int, ...]:
    return (2, 4, 6, 6) if build is _conv else (16, flat_size(w))


def _both(made: Made, level: str) -> tuple[np.ndarray, np.ndarray]:
    (feeds,) = made.feeds
    return tuple(np.float64(session(m, level=level).run(None, feeds)[0]) for m in (made.before, made.after))  # type: ignore[return-value]


def _check_scales(made: Made) -> None:
    """Positive normal numbers, and int32 codes of biases within their room."""
    constants = {t.name: numpy_helper.to_array(t) for t in made.after.graph.initializer}
    for node in made.after.graph.node:
        if node.op_type in (DQ, "QuantizeLinear"):
            scale = constants[node.input[1]]
            assert np.isfinite(scale).all()
            assert (scale >= np.finfo(np.float32).tiny).all()
        if node.op_type == DQ and node.input[0] in constants and constants[node.input[0]].dtype == np.int32:
            assert np.abs(constants[node.input[0]].astype(np.int64)).max() <= 2**30 + 2**8


@pytest.mark.parametrize("size", [(), (1,), (1, 1), (1, CHANNELS), (CHANNELS,)])
@pytest.mark.parametrize("passes", ["qdq", "dynamic"])
def test_a_bias_of_any_shape_broadcasts(size, passes) -> None:
    bias = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    for build in (_gemm, _matmul):
        w = _weights(3, [])
        feeds = [{"x1": np.random.default_rng(2).standard_normal(shape(build, w)).astype(np.float32)}]
        if passes == "dynamic" and build is _gemm:
            continue  # `prepare` makes MatMuls of Gemms before
        made = quantized(build(w, bias), feeds, passes)
        assert made.error() < 0.03


def test_a_bias_of_each_row_stays_float() -> None:
    w, bias = _weights(3, []), np.arange(16, dtype=np.float32).reshape(16, 1)
    made = quantized(_gemm(w, bias), [{"x1": np.ones((16, flat_size(w)), np.float32)}])
    assert made.error() < 0.02
    assert not [t for t in made.after.graph.initializer if t.data_type == TensorProto.INT32]


@pytest.mark.parametrize("fill", [-np.inf, np.inf, -3.4e38, -1e9])
@pytest.mark.parametrize("build", [_conv, _gemm, _matmul])
def test_a_bias_without_end_leaves_every_scale_a_number(build, fill) -> None:
    """-inf made scales of inf, and every number of the output NaN; other channels are as exact as ever."""
    w, bias = _weights(3, []), np.random.default_rng(1).standard_normal(CHANNELS).astype(np.float32)
    bias[5] = fill
    feeds = [{"x1": np.random.default_rng(2).standard_normal(shape(build, w)).astype(np.float32)}]
    made = quantized(build(w, bias), feeds)
    _check_scales(made)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        wanted, found = _both(made, level)
        np.testing.assert_allclose(found[:, 5], wanted[:, 5], rtol=1e-6, atol=np.abs(wanted[:, 6]).max())
        others = [i for i in range(CHANNELS) if i != 5]
        wanted, found = wanted[:, others], found[:, others]
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize("first", [None, 0.0, 3e8])
def test_readers_of_one_dead_weight_have_scales_for_their_own_bias(first) -> None:
    """The weight is stored once where one scale serves both biases, else twice."""
    w, tiny = _weights(5, [0.0]), Tiny()
    x, weight = tiny.input(1, 4, 6, 6), tiny.constant(w)
    given = [] if first is None else [tiny.constant(np.full(CHANNELS, first, np.float32))]
    one, two = tiny.one("Conv", x, weight, *given), tiny.one("Conv", x, weight, tiny.floats(CHANNELS))
    made = quantized(tiny.output(one, two), [{x: np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype("f")}])
    (feeds,) = made.feeds
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        wanted, found = (session(m, level=level).run(None, feeds) for m in (made.before, made.after))
        for a, b in zip(wanted, found, strict=True):
            assert np.abs(a - b)[0, 0].max() <= np.ptp(a) / 255


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(-30, 30))
def test_the_least_scale_of_zeros_is_taken_and_that_of_others_is_a_floor(seed, power) -> None:
    random = np.random.default_rng(seed)
    w = random.standard_normal((7, 5)).astype(np.float32)
    w[:, random.random(5) < 0.5] = 0
    least = (10.0**power * random.random(5) * (random.random(5) < 0.7)).astype(np.float32)
    plain, fitted = (quantize_weight(w, 1, WeightGrid(), least=own) for own in (None, least))
    zeros = ~w.any(axis=0)
    assert (fitted.scale >= least).all()
    np.testing.assert_array_equal(fitted.scale[~zeros], np.maximum(plain.scale, least)[~zeros])
    taken = zeros & (least > 0)
    np.testing.assert_allclose(fitted.scale[taken], np.maximum(least, 2.0**-120)[taken], rtol=1e-6)
    np.testing.assert_array_equal(fitted.dequantize()[:, zeros], 0)


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [
        (3.0, [3, 3]),
        ([3.0], [3, 3]),
        ([[3.0]], [3, 3]),
        ([1.0, 2.0], [1, 2]),
        ([[1.0, 2.0]], [1, 2]),
        ([[1.0], [2.0]], None),
        ([[1.0, 2.0], [3.0, 4.0]], None),
        ([1.0, 2.0, 3.0], None),
    ],
)
def test_one_number_for_each_channel(bias, wanted) -> None:
    weights = (("w", np.ones((3, 2))), ("b", bias))
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 2))],
        [numpy_helper.from_array(np.asarray(array, "f"), name) for name, array in weights],
    )
    node = ir.from_proto(helper.make_model(graph)).graph[0]
    found = channel_bias(node, 2, 2)
    assert (None if found is None else found.tolist()) == wanted
    assert channel_bias(node, None, 2) is None
    assert channel_bias(node, 0, 2) is None


@pytest.mark.parametrize(
    ("body", "position"),
    [
        ("p = MatMul(x, w) y = Add(p, b)", 1),
        ("p = MatMul(x, w) y = Add(b, p)", 0),
        ("p = MatMul(x, w) y = Add(p, row)", None),
        ("p = MatMul(x, w) y = Add(p, x)", None),
        ("p = MatMul(x, w) y = Sub(p, b)", None),
        ("p = MatMul(x, w) a = Add(p, b) y = Mul(a, p)", None),
        ("y = MatMul(x, w) z = Add(y, b)", None),
        ("p = Gemm(x, w) y = Add(p, b)", None),
    ],
)
def test_the_bias_behind_a_product_is_all_that_is_done_to_it(body, position) -> None:
    square, b = np.eye(3, dtype="f"), np.ones(3, "f")
    model = parse(body, inputs="float[3,3] x", outputs="float[3,3] y", w=square, b=b, row=b.reshape(1, 3))
    found = bias_behind(model.graph[0])
    assert (None if found is None else found[1]) == position
    if found is not None:
        assert found[0] is model.graph[1]
