"""Pairs behind norms, gates and linears: who absorbs a factor, what stays equal, and why others are left alone."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import opened

from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.absorb import other_consumers
from qcompile.passes.base import Region
from qcompile.passes.fold import fold, row_peaks
from qcompile.passes.linears import find_linears
from qcompile.passes.pairs import Pair, find_pairs
from qcompile.passes.statistics import Statistics

K, N = 8, 12
FLOAT = ir.DataType.FLOAT
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def start(dtype: str = "fp32", opset: int = 21) -> tuple[Builder, ir.Value]:
    b = Builder(opset=opset, dtype=dtype)
    return b, b.input("x", b.dtype, ["batch", "sequence", K])


def run(model: ir.Model, x: np.ndarray | None = None) -> list[np.ndarray]:
    session = opened(model)
    if x is None:
        dtype = model.graph.inputs[0].dtype.numpy()
        x = np.random.default_rng(1).standard_normal((2, 3, K)).astype(dtype)
    return [np.asarray(output, np.float32) for output in session.run(None, {"x": x})]


def random_factor(pair: Pair, seed: int = 2) -> np.ndarray:
    by_channel = np.random.default_rng(seed).uniform(0.25, 4, pair.channels.max() + 1).astype(np.float32)
    return by_channel[pair.channels]


def fold_all(model: ir.Model, *, tolerance: float = 1e-5) -> list[Pair]:
    """Fold random factors into every pair; the outputs must not move, and no node may appear."""
    before, nodes = run(model), [node.op_type for node in model.graph]
    region = Region.whole(model)
    pairs, _ = find_pairs(region)
    weights = [linear.read().copy() for pair in pairs for linear in pair.linears]
    for pair in pairs:
        fold(pair, random_factor(pair), region)
    assert [node.op_type for node in model.graph] == nodes
    after = [linear.read() for pair in pairs for linear in pair.linears]
    assert all((a != b).any() for a, b in zip(weights, after, strict=True))
    for a, b in zip(before, run(model), strict=True):
        np.testing.assert_allclose(b, a, atol=tolerance * np.abs(a).max())
    return pairs


def reason(model: ir.Model) -> str:
    pairs, skipped = find_pairs(Region.whole(model))
    assert not pairs
    assert len(skipped) == 1
    assert skipped[0].action == "skipped"
    return skipped[0].reason


def heads(b: Builder, v: ir.Value) -> dict[str, ir.Value]:
    """Two linears that read v."""
    return {"y": b.MatMul(v, weight(v.shape[-1] if v.shape else K, N)), "z": b.MatMul(v, weight(K, 5))}


# Cases 1 and 2: norms.


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("beta", [False, True])
def test_scale_of_a_decomposed_norm_absorbs(swap: bool, beta: bool) -> None:
    b, x = start()
    gamma = b.weight("gamma", weight(K))
    v = b.Mul(gamma, x) if swap else b.Mul(x, gamma)
    if beta:
        v = b.Add(weight(K), v) if swap else b.Add(v, weight(1, K))
    model = b.model(heads(b, v))
    pairs = fold_all(model)
    assert [pair.kind for pair in pairs] == ["norm"]
    assert len(pairs[0].absorbers) == 1 + beta
    assert len(pairs[0].linears) == 2


@pytest.mark.parametrize("norm", ["layer", "simplified", "skip"])
def test_norm_operators_absorb(norm: str) -> None:
    b, x = start()
    gamma, beta = b.weight("gamma", weight(K)), b.weight("beta", weight(K))
    if norm == "layer":
        v = b.LayerNormalization(x, gamma, beta, axis=-1)
    elif norm == "simplified":
        v = b.SimplifiedLayerNormalization(x, gamma, axis=-1, epsilon=1e-5)
    else:
        out = b.node("SkipLayerNormalization", x, b.Neg(b.Relu(x)), gamma, beta, weight(K), domain="com.microsoft")
        v = out[0]
    v.dtype, v.shape = FLOAT, ir.Shape(["batch", "sequence", K])
    outputs = heads(b, v)
    for value, width in zip(outputs.values(), (N, 5), strict=True):
        value.dtype, value.shape = FLOAT, ir.Shape(["batch", "sequence", width])
    model = b.model(outputs, check=False)
    pairs = fold_all(model)
    assert [pair.kind for pair in pairs] == ["norm"]
    assert len(pairs[0].absorbers) == (1 if norm == "simplified" else 2)


def test_sum_output_of_a_skip_norm_is_no_norm() -> None:
    b, x = start()
    gamma = b.weight("gamma", weight(K))
    out = b.node("SkipSimplifiedLayerNormalization", x, x, gamma, domain="com.microsoft", outputs=4)
    model = b.model({"y": b.MatMul(out[3], weight(K, N))}, check=False)
    assert "side output" in reason(model)


def test_norm_that_feeds_another_consumer_is_skipped() -> None:
    b, x = start()
    v = b.Mul(x, weight(K), name="norm")
    model = b.model({"y": b.MatMul(v, weight(K, K), name="fc"), "z": b.Add(v, x, name="residual")})
    assert reason(model) == "norm.out is also used by Add residual"


def test_norm_that_is_a_graph_output_is_skipped() -> None:
    b, x = start()
    v = b.Mul(x, weight(K))
    assert reason(b.model({"y": b.MatMul(v, weight(K, N)), "v": v})) == "v is a graph output"


def test_consumers_of_the_shape_do_not_count() -> None:
    b, x = start()
    v = b.Mul(x, weight(K))
    model = b.model({"y": b.MatMul(v, weight(K, N)), "z": b.Cast(b.Shape(v), to=FLOAT)})
    assert len(fold_all(model)) == 1


def test_shared_scale_gets_a_private_copy() -> None:
    b, x = start()
    gamma = b.weight("gamma", weight(K))
    v = b.Mul(x, gamma)
    model = b.model({"y": b.MatMul(v, weight(K, N)), "z": b.Mul(b.Relu(x), gamma)})
    gamma_before = model.graph.initializers["gamma"].const_value.numpy().copy()
    assert len(fold_all(model)) == 1
    assert "gamma_1" in model.graph.initializers
    np.testing.assert_array_equal(model.graph.initializers["gamma"].const_value.numpy(), gamma_before)


def test_tied_weight_is_skipped() -> None:
    b = Builder(opset=21)
    ids = b.input("x", ir.DataType.INT64, ["sequence"])
    table = b.weight("table", weight(20, K))
    v = b.Mul(b.Gather(table, ids), weight(K))
    model = b.model({"y": b.MatMul(v, b.Transpose(table, perm=[1, 0]))})
    assert reason(model) == "weight is tied to the embedding"


def test_weight_shared_by_matmuls_of_two_values_is_skipped() -> None:
    b, x = start()
    w = b.weight("w", weight(K, N))
    model = b.model({"y": b.MatMul(b.Mul(x, weight(K)), w, name="a"), "z": b.MatMul(b.Mul(x, weight(K)), w, name="b")})
    pairs, skipped = find_pairs(Region.whole(model))
    assert not pairs
    assert [d.reason for d in skipped] == [f"the weight w is also used by MatMul {other}" for other in "ba"]


def test_producer_outside_the_region_is_skipped() -> None:
    b, x = start()
    model = b.model({"y": b.MatMul(b.Mul(x, weight(K)), weight(K, N))})
    _, skipped = find_pairs(Region(model, list(model.graph)[1:]))
    assert skipped[0].reason == "its producer lies outside the region"


# Cases 3 and 5: linear into linear.


@pytest.mark.parametrize("swap", [False, True])
def test_up_projection_absorbs_through_the_gate(swap: bool) -> None:
    b, x = start()
    gate = b.MatMul(x, weight(K, N), name="gate")
    up = b.Add(b.MatMul(x, b.weight("up.weight", weight(K, N)), name="up"), weight(N))
    silu = b.Mul(gate, b.Sigmoid(gate))
    v = b.Mul(up, silu) if swap else b.Mul(silu, up)
    model = b.model({"y": b.MatMul(v, weight(N, K), name="down")})
    pairs = fold_all(model)
    assert [pair.kind for pair in pairs] == ["gate"]
    assert pairs[0].absorbers[0].constant.name == "up.weight"


def test_relu_lets_a_factor_through() -> None:
    b, x = start()
    v = b.Relu(b.Add(b.MatMul(x, weight(K, N)), weight(N)))
    assert [pair.kind for pair in fold_all(b.model({"y": b.MatMul(v, weight(N, K))}))] == ["linear"]


def test_gelu_does_not() -> None:
    b, x = start()
    hidden = b.MatMul(x, weight(K, N))
    model = b.model({"y": b.MatMul(b.Gelu(hidden, name="act"), weight(N, K))})
    _, skipped = find_pairs(Region.whole(model))
    assert [d.reason for d in skipped] == ["x has no producer", "Gelu act is not homogeneous"]


def test_decomposed_silu_alone_does_not() -> None:
    b, x = start()
    h = b.MatMul(b.Mul(x, weight(K)), weight(K, N), name="fc1")
    model = b.model({"y": b.MatMul(b.Mul(h, b.Sigmoid(h, name="sigmoid")), weight(N, K))})
    pairs, skipped = find_pairs(Region.whole(model))
    assert [pair.kind for pair in pairs] == ["norm"]
    assert "fc1.out is also used by" in skipped[0].reason
    assert "Sigmoid sigmoid is not homogeneous" in skipped[0].reason


# Element types, arguments, statistics.


def test_half_precision_model_with_a_cast() -> None:
    b, x = start("fp16")
    wide = b.Cast(x, to=FLOAT)
    v = b.Mul(b.weight("gamma", weight(K)), b.Cast(wide, to=ir.DataType.FLOAT16))
    model = b.model({"y": b.MatMul(v, weight(K, N))})
    pairs = fold_all(model, tolerance=4e-3)
    assert pairs[0].linears[0].weight.const_value.dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("extreme", [1e-6, 1e7])
def test_half_precision_factors_stay_in_range(extreme: float) -> None:
    b, x = start("fp16")
    model = b.model({"y": b.MatMul(b.Mul(x, weight(K)), weight(K, N))})
    before, region = run(model), Region.whole(model)
    pair = find_pairs(region)[0][0]
    applied = fold(pair, np.full(K, extreme, np.float32), region)
    assert (applied != np.float32(extreme)).all()
    for linear in pair.linears:
        assert np.isfinite(linear.read()).all()
    np.testing.assert_allclose(run(model)[0], before[0], atol=5e-3 * np.abs(before[0]).max())


def test_the_peak_of_a_row_has_either_sign() -> None:
    b, x = start()
    w = weight(K, 8)
    w[:, 0] = np.resize([9, -9], K)
    (linear,) = find_linears(b.model({"y": b.MatMul(x, b.weight("w", w))}).graph)
    np.testing.assert_array_equal(row_peaks(linear), np.full(K, 9, np.float32))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_bad_factors_are_refused(bad: float) -> None:
    b, x = start()
    region = Region.whole(b.model({"y": b.MatMul(b.Mul(x, weight(K)), weight(K, N))}))
    factor = np.ones(K, np.float32)
    factor[3] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        fold(find_pairs(region)[0][0], factor, region)


def test_statistics_follow() -> None:
    b, x = start()
    region = Region.whole(b.model({"y": b.MatMul(b.Mul(x, weight(K)), weight(K, N))}))
    pair = find_pairs(region)[0][0]
    rows = weight(50, K)
    region.statistics[pair.value] = Statistics(50, rows.T @ rows, np.abs(rows).max(axis=0))
    factor = fold(pair, random_factor(pair), region)
    scaled = rows / factor
    np.testing.assert_allclose(region.statistics[pair.value].gram, scaled.T @ scaled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(region.statistics[pair.value].absmax, np.abs(scaled).max(axis=0), rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(2.0**-8, 2.0**8, width=32), min_size=K, max_size=K), st.sampled_from(["norm", "gate"]))
def test_any_positive_factor_leaves_the_output_alone(factor: list[float], kind: str) -> None:
    b, x = start()
    v = b.Mul(x, weight(K)) if kind == "norm" else b.Mul(b.Sigmoid(x), b.MatMul(x, weight(K, K)))
    model = b.model({"y": b.MatMul(v, weight(K, N))})
    before, region = run(model)[0], Region.whole(model)
    pair = next(pair for pair in find_pairs(region)[0] if pair.kind == kind)
    fold(pair, np.array(factor, np.float32), region)
    np.testing.assert_allclose(run(model)[0], before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("norm", ["rms", "layer", "simplified", "skip"])
def test_tiny_decoders(norm: str) -> None:
    model = tiny_decoder(norm=norm)
    region = Region.whole(model)
    ids = np.random.default_rng(3).integers(0, 256, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def logits() -> np.ndarray:
        return opened(model).run(None, feeds)[0]

    before = logits()
    pairs, skipped = find_pairs(region)
    assert [pair.kind for pair in pairs] == ["norm", "attention", "norm", "gate"] * 2
    assert [decision.reason for decision in skipped] == ["weight is tied to the embedding"]
    for pair in pairs:
        fold(pair, random_factor(pair), region)
    np.testing.assert_allclose(logits(), before, atol=1e-4 * np.abs(before).max())


def test_others_that_read_a_value_are_all_but_one_input_and_those_that_ask_for_its_shape() -> None:
    b, x = start()
    v = b.Relu(x)
    twice, other, _ = b.Mul(v, v).producer(), b.Neg(v).producer(), (b.Shape(v), b.Size(v))
    assert twice is not None
    assert other_consumers(v, twice, 0) == [twice, other]
    assert other_consumers(v, other, 0) == [twice, twice]
