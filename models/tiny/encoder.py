"""A BERT-shaped encoder: post-norm LayerNormalization, biases everywhere, GELU through Erf."""

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import embedding_table, linear_weight, norm_scale


def tiny_encoder(
    *,
    layers: int = 2,
    hidden: int = 48,
    heads: int = 4,
    ffn: int = 128,
    vocab: int = 256,
    positions: int = 64,
    seed: int = 0,
    opset: int = 21,
    dtype: str = "fp32",
    outliers: bool = True,
) -> ir.Model:
    """An encoder: input_ids, attention_mask, token_type_ids (batch, sequence) to last_hidden_state (…, hidden)."""
    b, rng, ints = Builder(opset=opset, dtype=dtype), np.random.default_rng(seed), ir.DataType.INT64
    ids, attention_mask, types = (
        b.input(name, ints, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    )

    def linear(x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        w = b.weight(f"{name}.weight", linear_weight(rng, k, n, gain=0.5))
        bias = b.weight(f"{name}.bias", (0.2 * rng.standard_normal(n)).astype(np.float32))
        return b.Add(b.MatMul(x, w, name=name), bias)

    def norm(x: ir.Value, name: str) -> ir.Value:
        gamma = norm_scale(rng, hidden, outliers=outliers and name.startswith("layer")) / (2.0 if outliers else 1.0)
        bias = (0.3 * rng.standard_normal(hidden)).astype(np.float32)
        scale = b.weight(f"{name}.weight", gamma)
        return b.LayerNormalization(x, scale, b.weight(f"{name}.bias", bias), name=name, axis=-1, epsilon=1e-6)

    def table(name: str, rows: int) -> ir.Value:
        return b.weight(f"embeddings.{name}.weight", embedding_table(rng, rows, hidden))

    def split(x: ir.Value) -> ir.Value:
        return b.Transpose(b.Reshape(x, [0, 0, heads, hidden // heads]), perm=[0, 2, 1, 3])

    def attention(x: ir.Value, name: str, mask: ir.Value) -> ir.Value:
        query, key, value = (split(linear(x, f"{name}.{part}", hidden, hidden)) for part in ("query", "key", "value"))
        scores = b.Mul(b.MatMul(query, b.Transpose(key, perm=[0, 1, 3, 2])), 0.2 / (hidden // heads) ** 0.5)
        context = b.MatMul(b.Softmax(b.Where(mask, scores, -1e4), axis=-1), value)
        merged = b.Reshape(b.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, hidden])
        return linear(merged, f"{name}.output", hidden, hidden)

    def gelu(x: ir.Value) -> ir.Value:
        return b.Mul(b.Mul(x, 0.5), b.Add(b.Erf(b.Mul(x, 0.5**0.5)), 1.0))

    sequence = b.Squeeze(b.Shape(ids, start=1, end=2), [0])
    counted = b.Range(np.int64(0), sequence, np.int64(1))
    places = b.Gather(table("position", positions), counted, name="position", axis=0)
    x = b.Gather(table("word", vocab), ids, name="embeddings.word", axis=0)
    x = b.Add(b.Add(x, b.Gather(table("token_type", 2), types, name="token_type", axis=0)), places)
    x = norm(x, "embeddings.norm")
    mask = b.Cast(b.Unsqueeze(attention_mask, [1, 2]), to=ir.DataType.BOOL)
    for i in range(layers):
        x = norm(b.Add(x, attention(x, f"layer.{i}.attention", mask)), f"layer.{i}.attention.norm")
        inner = gelu(linear(x, f"layer.{i}.intermediate", hidden, ffn))
        x = norm(b.Add(x, linear(inner, f"layer.{i}.output", ffn, hidden)), f"layer.{i}.output.norm")
    return b.model({"last_hidden_state": x})
