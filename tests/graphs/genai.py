"""Decoders as onnxruntime-genai's builder writes them: GroupQueryAttention over caches of symbolic width."""

import numpy as np
from onnx import TensorProto, helper

from graphs.table import Graph, case

_LISTS = {
    "pack": 12,
    "smooth,awq,gptq,pack": 12,
    "awq(insert_mul=true),pack": 12,
    "smooth,qdq": 15,
    "qdq(operators=all)": 12,
    "dynamic": 15,
    "outlier,qdq": 15,
    "qdq,bias_correction": 15,
}
_WIDTH, _HEADS, _CACHED, _HEAD, _VOCABULARY = 64, 4, 2, 16, 96
_MS = "com.microsoft"


def _weight(make: Graph, rows: int, columns: int) -> str:
    return make.constant((make.random.standard_normal((rows, columns)) / rows**0.5).astype(make.dtype), "w")


def _decoder(make: Graph, layers: int = 2, *, packed: bool = False, window: int = 0) -> None:
    """input_ids and attention_mask, caches ("b", heads, "past", "width") to logits and caches, no value_info.

    window: over the cache of the first layer, which holds no more.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(make.dtype))
    make.opsets[_MS] = 1
    for name, shape in (("input_ids", ("b", "s")), ("attention_mask", ("b", "total"))):
        make.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    make.makers["input_ids"] = lambda random: random.integers(0, _VOCABULARY, (2, 12))
    make.makers["attention_mask"] = lambda random: np.ones((2, 12), np.int64)
    lengths, total = _lengths(make)
    angles = np.outer(np.arange(64), 100.0 ** (-np.arange(_HEAD // 2) / (_HEAD // 2)))
    tables = [make.constant(own(angles).astype(make.dtype)) for own in (np.cos, np.sin)]
    table = make.constant(make.random.standard_normal((_VOCABULARY, _WIDTH)).astype(make.dtype), "table")
    x = make.one("Gather", table, "input_ids")
    gammas = [make.constant(np.ones(_WIDTH, make.dtype)) for _ in range(2 * layers + 1)]
    n = make.one("SimplifiedLayerNormalization", x, gammas[0], epsilon=1e-5)
    for layer in range(layers):
        caches = _caches(make, layer, kind)
        q, k, v = _projected(make, n, packed=packed)
        a, *present = make.op(
            "GroupQueryAttention", q, k, v, *caches, lengths, total, *tables, outputs=3, domain=_MS,
            num_heads=_HEADS, kv_num_heads=_CACHED, do_rotary=1, scale=_HEAD**-0.5, **_sliding(window, layer),
        )  # fmt: skip
        for own, end in zip(present, ("key", "value"), strict=True):
            make.nodes.append(helper.make_node("Identity", [own], [f"present.{layer}.{end}"]))
            shape = ["b", _CACHED, "total", "width"]
            make.outputs.append(helper.make_tensor_value_info(f"present.{layer}.{end}", kind, shape))
        o = make.one("MatMul", a, _weight(make, _HEADS * _HEAD, _WIDTH))
        n, x = _skip(make, x, o, gammas[2 * layer + 1])
        gate, up = (make.one("MatMul", n, _weight(make, _WIDTH, 96)) for _ in range(2))
        h = make.one("Mul", make.one("Mul", gate, make.one("Sigmoid", gate)), up)
        n, x = _skip(make, x, make.one("MatMul", h, _weight(make, 96, _WIDTH)), gammas[2 * layer + 2])
    head = make.one("MatMul", n, make.one("Transpose", table, perm=[1, 0]))
    make.nodes.append(helper.make_node("Identity", [head], ["logits"]))
    make.outputs.insert(0, helper.make_tensor_value_info("logits", kind, ["b", "s", _VOCABULARY]))


def _sliding(window: int, layer: int) -> dict[str, int]:
    return {"local_window_size": window, "sliding_window_cache": 1} if window and layer == 0 else {}


def _lengths(make: Graph) -> tuple[str, str]:
    """seqlens_k and total_sequence_length, int32, as the builder computes them of the mask."""
    summed = make.one("ReduceSum", "attention_mask", make.constant(np.array([1])), keepdims=0)
    last = make.one("Sub", summed, make.constant(np.array([1])))
    size = make.one("Gather", make.one("Shape", "attention_mask"), make.constant(np.int64(1)), axis=0)
    return make.one("Cast", last, to=TensorProto.INT32), make.one("Cast", size, to=TensorProto.INT32)


def _caches(make: Graph, layer: int, kind: int) -> list[str]:
    names = [f"past_key_values.{layer}.{end}" for end in ("key", "value")]
    for name in names:
        make.inputs.append(helper.make_tensor_value_info(name, kind, ["b", _CACHED, "past", "width"]))
        make.makers[name] = lambda random: np.zeros((2, _CACHED, 0, _HEAD), make.dtype)
    return names


def _projected(make: Graph, n: str, *, packed: bool) -> list[str]:
    wide, narrow = _HEADS * _HEAD, _CACHED * _HEAD
    if packed:
        return [make.one("MatMul", n, _weight(make, _WIDTH, wide + 2 * narrow)), "", ""]
    return [make.one("MatMul", n, _weight(make, _WIDTH, columns)) for columns in (wide, narrow, narrow)]


def _skip(make: Graph, x: str, y: str, gamma: str) -> tuple[str, str]:
    """(normalized, x + y)"""
    n, _, _, total = make.op("SkipSimplifiedLayerNormalization", x, y, gamma, outputs=4, domain=_MS, epsilon=1e-5)
    make.nodes[-1].output[1] = make.nodes[-1].output[2] = ""
    return n, total


@case(_LISTS, options={"min_coverage": 0.0, "samples": 6, "context": 24})
def a_decoder_of_the_builder(make: Graph) -> None:
    _decoder(make)


@case(_LISTS, options={"min_coverage": 0.0, "samples": 6, "context": 24})
def a_packed_decoder_of_the_builder(make: Graph) -> None:
    _decoder(make, packed=True)


@case(_LISTS, options={"min_coverage": 0.0, "samples": 6, "context": 24})
def a_half_decoder_of_the_builder(make: Graph) -> None:
    make.dtype = np.float16
    _decoder(make)
