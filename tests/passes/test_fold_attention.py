"""The channel map between v_proj and o_proj: against brute force, and where it must refuse."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.fold import fold
from qcompile.passes.pairs import Pair, find_pairs

K, HEADS, WIDTH = 8, 4, 3
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run(model: ir.Model, fetch: str) -> np.ndarray:
    proto = ir.to_proto(model)
    if fetch not in [output.name for output in proto.graph.output]:
        proto.graph.output.add().name = fetch
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    x = np.random.default_rng(1).standard_normal((2, 5, K)).astype(np.float32)
    return ort.InferenceSession(proto.SerializeToString(), options).run([fetch], {"x": x})[0]


def attention(
    spread: Callable[[Builder, ir.Value], ir.Value],
    *,
    value_width: int,
    merged: int = HEADS * WIDTH,
    bias: bool = False,
) -> ir.Model:
    """x → v_proj → `spread` (batch, HEADS, sequence, WIDTH) → probabilities @ it → o_proj (merged, 6)."""
    b = Builder(opset=21)
    x = b.input("x", ir.DataType.FLOAT, ["batch", "sequence", K])
    value = b.MatMul(x, b.weight("v.weight", weight(K, value_width)), name="v_proj")
    if bias:
        value = b.Add(value, b.weight("v.bias", weight(value_width)))
    query = b.Transpose(b.Reshape(b.MatMul(x, weight(K, HEADS * 2)), [0, 0, HEADS, 2]), perm=[0, 2, 1, 3])
    scores = b.MatMul(query, b.Transpose(query, perm=[0, 1, 3, 2]))
    context = b.MatMul(b.Softmax(scores, axis=-1), spread(b, value))
    rows = b.Reshape(b.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, merged])
    rows.dtype, rows.shape = ir.DataType.FLOAT, ir.Shape(["batch", "sequence", merged])
    return b.model({"y": b.MatMul(rows, b.weight("o.weight", weight(merged, 6)), name="o_proj")})


def split_heads(b: Builder, value: ir.Value, heads: int) -> ir.Value:
    return b.Transpose(b.Reshape(value, [0, 0, heads, WIDTH]), perm=[0, 2, 1, 3])


def plain(b: Builder, value: ir.Value) -> ir.Value:
    return split_heads(b, value, HEADS)


def grouped(b: Builder, value: ir.Value) -> ir.Value:
    wide = b.Expand(b.Unsqueeze(split_heads(b, value, 2), [2]), [1, 1, HEADS // 2, 1, 1])
    shape = b.Concat(b.Shape(wide, start=0, end=1), [HEADS, -1, WIDTH], axis=0)
    return b.Reshape(wide, shape)


def multi_query(b: Builder, value: ir.Value) -> ir.Value:
    return b.Unsqueeze(value, [1])  # broadcast by the MatMul


def fused_split(b: Builder, value: ir.Value) -> ir.Value:
    _, _, third = b.node("Split", value, [HEADS * WIDTH] * 3, outputs=3, axis=-1)
    return plain(b, third)


def fused_slices(b: Builder, value: ir.Value) -> ir.Value:
    first = b.Slice(value, [0], [HEADS * WIDTH], [2])
    second = b.Slice(value, [HEADS * WIDTH], [2 * HEADS * WIDTH], [-1])
    b.Neg(first)
    return plain(b, second)


def fused_gather(b: Builder, value: ir.Value) -> ir.Value:
    parts = b.Transpose(b.Reshape(value, [0, 0, 3, HEADS, WIDTH]), perm=[2, 0, 3, 1, 4])
    return b.Gather(parts, np.array(1), axis=0)


def attention_pair(model: ir.Model) -> Pair:
    pairs, _ = find_pairs(Region.whole(model))
    (pair,) = [pair for pair in pairs if pair.kind == "attention"]
    return pair


def brute_force(model: ir.Model, pair: Pair, columns: int) -> np.ndarray:
    """For each channel of o_proj's input, the column of v_proj whose change moves it."""
    before = run(model, pair.name)
    stored = model.graph.initializers["v.weight"]
    original = stored.const_value
    found = np.full(pair.channels.size, -1)
    for column in range(columns):
        changed = original.numpy().copy()
        changed[:, column] *= 2
        stored.const_value = ir.tensor(changed, name="v.weight")
        moved = np.abs(run(model, pair.name) - before).reshape(-1, before.shape[-1]).max(axis=0) > 1e-6
        assert (found[moved] == -1).all()
        found[moved] = column
    stored.const_value = original
    return found


CASES = [
    (plain, HEADS * WIDTH),
    (grouped, 2 * WIDTH),
    (multi_query, WIDTH),
    (fused_split, 3 * HEADS * WIDTH),
    (fused_slices, 2 * HEADS * WIDTH),
    (fused_gather, 3 * HEADS * WIDTH),
]


@pytest.mark.parametrize(("spread", "width"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_channel_map_against_brute_force(spread: Callable, width: int, bias: bool) -> None:
    model = attention(spread, value_width=width, bias=bias)
    pair = attention_pair(model)
    assert len(pair.absorbers) == 1 + bias
    np.testing.assert_array_equal(pair.channels, brute_force(model, pair, width))

    before = run(model, "y")
    factor = np.random.default_rng(2).uniform(0.3, 3, width).astype(np.float32)[pair.channels]
    fold(pair, factor, Region.whole(model))
    np.testing.assert_allclose(run(model, "y"), before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rank", [3, 4])
def test_the_attention_operator(kv_heads: int, rank: int) -> None:
    b = Builder(opset=23)
    x = b.input("x", ir.DataType.FLOAT, [2, 5, K])
    query = b.MatMul(x, weight(K, HEADS * WIDTH))
    key = b.MatMul(x, weight(K, kv_heads * WIDTH))
    value = b.MatMul(x, b.weight("v.weight", weight(K, kv_heads * WIDTH)))
    if rank == 4:
        out = b.Attention(split_heads(b, query, HEADS), split_heads(b, key, kv_heads), split_heads(b, value, kv_heads))
        rows = b.Reshape(b.Transpose(out, perm=[0, 2, 1, 3]), [0, 0, HEADS * WIDTH])
    else:
        rows = b.Attention(query, key, value, q_num_heads=HEADS, kv_num_heads=kv_heads)
    model = b.model({"y": b.MatMul(rows, weight(HEADS * WIDTH, 6))})
    pair = attention_pair(model)
    np.testing.assert_array_equal(pair.channels, brute_force(model, pair, kv_heads * WIDTH))


def test_channels_that_share_a_producer_share_their_factor() -> None:
    model = attention(grouped, value_width=2 * WIDTH)
    pair = attention_pair(model)
    energy = np.arange(HEADS * WIDTH, dtype=np.float32)
    expected = energy.reshape(2, 2, WIDTH)
    np.testing.assert_array_equal(pair.shared.pool_max(energy).reshape(2, 2, WIDTH), expected[:, [1, 1]])
    np.testing.assert_allclose(pair.shared.pool_mean(energy).reshape(2, 2, WIDTH)[:, 0], expected.mean(axis=1))
    with pytest.raises(ValueError, match="share a producer's channel"):
        fold(pair, energy + 1, Region.whole(model))


def refusal(model: ir.Model) -> str:
    """Why the value before o_proj is left alone."""
    name = next(node for node in model.graph if node.name == "o_proj").inputs[0].name
    _, skipped = find_pairs(Region.whole(model))
    return next(decision.reason for decision in skipped if decision.node == name)


def test_a_scrambling_view_is_refused() -> None:
    # (batch, heads, sequence, width) read as (batch, sequence, heads * width) without a Transpose: no channel map.
    b = Builder(opset=21)
    x = b.input("x", ir.DataType.FLOAT, ["batch", "sequence", K])
    value = plain(b, b.MatMul(x, weight(K, HEADS * WIDTH)))
    rows = b.Reshape(value, b.Concat(b.Shape(x, start=0, end=2), [HEADS * WIDTH], axis=0))
    rows.dtype, rows.shape = ir.DataType.FLOAT, ir.Shape(["batch", "sequence", HEADS * WIDTH])
    model = b.model({"y": b.MatMul(rows, weight(HEADS * WIDTH, 6), name="o_proj")})
    assert "mixes static and symbolic axes" in refusal(model)


def test_overlapping_slices_are_refused() -> None:
    def overlapping(b: Builder, value: ir.Value) -> ir.Value:
        b.Slice(value, [HEADS * WIDTH - 1], [HEADS * WIDTH + 1], [2], name="other")
        return plain(b, b.Slice(value, [0], [HEADS * WIDTH], [2]))

    model = attention(overlapping, value_width=2 * HEADS * WIDTH)
    assert refusal(model) == "Slice other reads the same channels"


def test_a_value_with_another_reader_is_refused() -> None:
    def observed(b: Builder, value: ir.Value) -> ir.Value:
        b.Neg(value, name="other")
        return plain(b, value)

    assert refusal(attention(observed, value_width=HEADS * WIDTH)) == "v_proj.out is also used by Neg other"


def test_an_unknown_shape_is_refused() -> None:
    model = attention(plain, value_width=HEADS * WIDTH)
    next(node for node in model.graph if node.name == "v_proj").outputs[0].shape = None
    assert "a shape at Reshape" in refusal(model)


def test_slices_at_computed_places_are_refused() -> None:
    def computed(b: Builder, value: ir.Value) -> ir.Value:
        return plain(
            b, b.Slice(value, b.Sub(b.Shape(value, start=1, end=2), b.Shape(value, start=1, end=2)), [12], [2])
        )

    assert "its parameters are not constant" in refusal(attention(computed, value_width=HEADS * WIDTH))


def test_values_in_a_cache_are_refused() -> None:
    _, skipped = find_pairs(Region.whole(tiny_decoder(kv_cache=True)))
    reasons = [decision.reason for decision in skipped]
    assert [f"present.{i}.value is a graph output (a cache)" for i in (0, 1)] == reasons[:2]
