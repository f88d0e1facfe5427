"""A Llama-shaped decoder in the operators that torch.onnx.export writes."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import embedding_table, linear_weight, norm_scale, with_loud_columns

NORMS = ("rms", "layer", "rmsnorm", "simplified", "skip")


@dataclass
class _Decoder:
    b: Builder
    rng: np.random.Generator
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    norm: str
    outliers: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linear(self, x: ir.Value, name: str, k: int, n: int, *, gain: float = 1.0, loud: bool = False) -> ir.Value:
        w = with_loud_columns(self.rng, linear_weight(self.rng, k, n, gain=gain), outliers=loud and self.outliers)
        return self.b.MatMul(x, self.b.weight(f"{name}.weight", w), name=name)

    def add_norm(self, x: ir.Value, branch: ir.Value | None, name: str, *, outliers: bool) -> tuple[ir.Value, ir.Value]:
        """(residual, normed): x plus the branch that just ended, and its norm."""
        b, gamma = self.b, norm_scale(self.rng, self.hidden, outliers=outliers)
        scale = b.weight(f"{name}.weight", gamma)
        if self.norm == "skip" and branch is not None:
            out = b.node(
                "SkipSimplifiedLayerNormalization", x, branch, scale,
                name=name, domain="com.microsoft", outputs=4, epsilon=1e-5,
            )  # fmt: skip
            return self.typed(out[3]), self.typed(out[0])
        if branch is not None:
            x = self.typed(b.Add(x, branch, name=f"{name}.residual"))
        if self.norm == "rms":
            mean = b.ReduceMean(b.Pow(x, 2.0), [-1], keepdims=1)
            inverse = b.Reciprocal(b.Sqrt(b.Add(mean, 1e-5)))
            return x, b.Mul(scale, b.Mul(x, inverse), name=name)
        if self.norm == "layer":
            bias = b.weight(f"{name}.bias", (0.1 * gamma * self.rng.standard_normal(self.hidden)).astype(np.float32))
            return x, b.LayerNormalization(x, scale, bias, name=name, axis=-1, epsilon=1e-5)
        op_type = "RMSNormalization" if self.norm == "rmsnorm" else "SimplifiedLayerNormalization"
        return x, self.typed(b.node(op_type, x, scale, name=name, axis=-1, epsilon=1e-5)[0])

    def typed(self, value: ir.Value) -> ir.Value:
        """Type and shape (batch, sequence, hidden) by hand: behind a Reshape or ONNX Runtime's own operators inference
        loses them."""
        return self.shaped(value, "sequence", self.hidden)

    def shaped(self, value: ir.Value, *dims: int | str) -> ir.Value:
        value.dtype, value.shape = self.b.dtype, ir.Shape(["batch", *dims])
        return value

    def heads_of(self, x: ir.Value, count: int) -> ir.Value:
        """(batch, sequence, count * head_dim) to (batch, count, sequence, head_dim)."""
        return self.b.Transpose(self.b.Reshape(x, [0, 0, count, self.head_dim]), perm=[0, 2, 1, 3])

    def rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        b, half = self.b, self.head_dim // 2
        left, right = b.Slice(x, [0], [half], [3], [1]), b.Slice(x, [half], [self.head_dim], [3], [1])
        return b.Add(b.Mul(x, cos), b.Mul(b.Concat(b.Neg(right), left, axis=-1), sin))

    def repeat_heads(self, x: ir.Value) -> ir.Value:
        """(batch, kv_heads, total, head_dim) to (batch, heads, total, head_dim), as grouped-query attention does."""
        if self.kv_heads == self.heads:
            return x
        wide = self.b.Expand(self.b.Unsqueeze(x, [2]), [1, 1, self.heads // self.kv_heads, 1, 1])
        shape = self.b.Concat(self.b.Shape(x, start=0, end=1), [self.heads, -1, self.head_dim], axis=0)
        return self.b.Reshape(wide, shape)

    def attention(
        self,
        x: ir.Value,
        name: str,
        rotary: tuple[ir.Value, ir.Value],
        mask: ir.Value,
        past: tuple[ir.Value, ir.Value] | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(output of o_proj, present key, present value)."""
        b, kv_width = self.b, self.kv_heads * self.head_dim
        query = self.heads_of(self.linear(x, f"{name}.q_proj", self.hidden, self.hidden), self.heads)
        key = self.heads_of(self.linear(x, f"{name}.k_proj", self.hidden, kv_width), self.kv_heads)
        value = self.heads_of(self.linear(x, f"{name}.v_proj", self.hidden, kv_width, loud=True), self.kv_heads)
        query, key = self.rotate(query, *rotary), self.rotate(key, *rotary)
        if past is not None:
            key, value = b.Concat(past[0], key, axis=2), b.Concat(past[1], value, axis=2)
        # Keys behind outlier norms are large: the square keeps the softmax from being one-hot.
        temper = 1.0 / (self.head_dim * (20.0 if self.outliers else 1.0))
        scores = b.Mul(b.MatMul(query, b.Transpose(self.repeat_heads(key), perm=[0, 1, 3, 2])), temper)
        weights = b.Softmax(b.Where(mask, scores, -1e4), axis=-1)
        context = b.Transpose(b.MatMul(weights, self.repeat_heads(value)), perm=[0, 2, 1, 3])
        merged = b.Reshape(context, [0, 0, self.hidden])
        return self.linear(merged, f"{name}.o_proj", self.hidden, self.hidden, gain=0.2), key, value

    def mlp(self, x: ir.Value, name: str) -> ir.Value:
        b = self.b
        gate = self.linear(x, f"{name}.gate_proj", self.hidden, self.ffn, gain=0.3)
        up = self.linear(x, f"{name}.up_proj", self.hidden, self.ffn, gain=0.3, loud=True)
        active = b.Mul(b.Mul(gate, b.Sigmoid(gate)), up, name=f"{name}.act")
        return self.linear(active, f"{name}.down_proj", self.ffn, self.hidden, gain=0.1)

    def rotary(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin, (batch or 1, 1, sequence, head_dim), of positions (batch or 1, sequence)."""
        b = self.b
        inverse = (10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)).astype(np.float32)
        angles = b.Mul(b.Cast(b.Unsqueeze(positions, [1, 3]), to=b.dtype), np.concatenate([inverse, inverse]))
        return b.Cos(angles), b.Sin(angles)


def _mask(b: Builder, past_length: ir.Value, sequence: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Boolean (batch, 1, sequence, total): the key is not padding and does not lie in the query's future."""
    total = b.Add(past_length, sequence)
    keys = b.Range(np.int64(0), total, np.int64(1))
    queries = b.Range(past_length, total, np.int64(1))
    causal = b.LessOrEqual(b.Unsqueeze(keys, [0]), b.Unsqueeze(queries, [1]))
    return b.And(causal, b.Cast(b.Unsqueeze(attention_mask, [1, 2]), to=ir.DataType.BOOL))


def tiny_decoder(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 160,
    vocab: int = 256,
    seed: int = 0,
    tied: bool = True,
    kv_cache: bool = False,
    norm: str = "rms",
    opset: int = 21,
    dtype: str = "fp32",
    outliers: bool = True,
) -> ir.Model:
    """A decoder: input_ids and attention_mask (batch, sequence) to logits (batch, sequence, vocab).

    With `kv_cache` also position_ids and past_key_values.{i}.key / .value (batch, kv_heads, past_sequence, head_dim)
    to present.{i}.key / .value; attention_mask is then (batch, total_sequence).
    norm: "rms" decomposed, "layer" LayerNormalization with bias, "rmsnorm" RMSNormalization (opset 23 and up),
    "simplified" and "skip" ONNX Runtime's SimplifiedLayerNormalization and SkipSimplifiedLayerNormalization.
    tied: the lm_head is Transpose(embedding), as torch.onnx.export leaves it; else a (hidden, vocab) weight.
    outliers: a few norm scales are twenty times, a few columns of v_proj and up_proj eight times the others.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if opset < (23 if norm == "rmsnorm" else 18):
        raise ValueError(f"opset {opset} is too old for norm {norm!r}")
    b, ints = Builder(opset=opset, dtype=dtype), ir.DataType.INT64
    d = _Decoder(b, np.random.default_rng(seed), hidden, heads, kv_heads, ffn, norm, outliers)
    input_ids = b.input("input_ids", ints, ["batch", "sequence"])
    attention_mask = b.input("attention_mask", ints, ["batch", "total_sequence" if kv_cache else "sequence"])
    sequence = b.Squeeze(b.Shape(input_ids, start=1, end=2), [0])
    pasts: list[tuple[ir.Value, ir.Value]] = []
    if kv_cache:
        positions = b.input("position_ids", ints, ["batch", "sequence"])
        cache: list[int | str] = ["batch", kv_heads, "past_sequence", d.head_dim]
        for i in range(layers):
            key, value = (b.input(f"past_key_values.{i}.{part}", b.dtype, cache) for part in ("key", "value"))
            pasts.append((key, value))
        past_length = b.Squeeze(b.Shape(pasts[0][0], start=2, end=3), [0])
    else:
        past_length = b.weight("no_past", np.array(0))
        positions = b.Unsqueeze(b.Range(past_length, sequence, np.int64(1)), [0])
    table = b.weight("model.embed_tokens.weight", embedding_table(d.rng, vocab, hidden))
    x: ir.Value = b.Gather(table, input_ids, name="model.embed_tokens", axis=0)
    mask, rotary = _mask(b, past_length, sequence, attention_mask), d.rotary(positions)
    branch: ir.Value | None = None
    presents: dict[str, ir.Value] = {}
    for i in range(layers):
        name = f"model.layers.{i}"
        x, normed = d.add_norm(x, branch, f"{name}.input_layernorm", outliers=outliers)
        branch, key, value = d.attention(normed, f"{name}.self_attn", rotary, mask, pasts[i] if kv_cache else None)
        if kv_cache:
            for part, present in (("key", key), ("value", value)):
                presents[f"present.{i}.{part}"] = d.shaped(present, kv_heads, "total_sequence", d.head_dim)
        x, normed = d.add_norm(x, branch, f"{name}.post_attention_layernorm", outliers=outliers)
        branch = d.mlp(normed, f"{name}.mlp")
    _, normed = d.add_norm(x, branch, "model.norm", outliers=False)
    head = b.Transpose(table, perm=[1, 0]) if tied else b.weight(
        "lm_head.weight", linear_weight(d.rng, hidden, vocab, gain=2.0)
    )  # fmt: skip
    logits = d.shaped(b.MatMul(normed, head, name="lm_head"), "sequence", vocab)
    # The checker does not know ONNX Runtime's own norms.
    return b.model({"logits": logits, **presents}, check=norm not in ("simplified", "skip"))
