"""What is damaged: small models that between them hold what the code looks at, with data, recipes and tokenizers."""

import importlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import graphs
import numpy as np
import onnx
from graphs.table import CASES, Graph
from onnx import TensorProto, helper, numpy_helper

MODEL, DATA, ARRAYS, RECIPE, TOKENIZER = "model.onnx", "model.data", "x.npz", "recipe.yaml", "tokenizer.json"
_RECIPE = """\
passes: [smooth, "awq(grid=4)", pack]
bits: 4
group_size: 16
symmetric: false
target: qcompile
lm_head: 8
embedding: keep
include: ["*"]
exclude: []
samples: 2
context: 16
min_coverage: 0.0
seed: 0
"""
_TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    },
    "added_tokens": [
        {
            "id": 0,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "FixedLength", "length": 5},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {c: i for i, c in enumerate("<abcdefghijklmnopqrstuvwxyzĠ.,")} | {"th": 30, "the": 31},
        "merges": [["t", "h"], ["th", "e"]],
    },
}


@dataclass(frozen=True)
class Seed:
    """Files by name, and the pass lists that suit them."""

    files: dict[str, bytes]
    lists: tuple[str, ...]


# Bytes of a model of the table: larger ones would take the time of many small ones.
_SMALL = 1 << 17
_LINEAR = ("pack", "smooth,awq,gptq,pack", "smooth,qdq,bias_correction", "dynamic", "pack,fuse", "outlier,qdq")
_BUILDERS: list[Callable[[], Seed]] = []


def _seed(build: Callable[[], Seed]) -> Callable[[], Seed]:
    _BUILDERS.append(build)
    return build


@cache
def seeds() -> tuple[Seed, ...]:
    """All of them, in the order of this file, then the small ones of the table of graphs (tests/graphs/)."""
    for module in sorted(path.stem for path in Path(graphs.__file__).parent.glob("*.py")):
        importlib.import_module(f"graphs.{module}")
    table = (_made(row.made(), *row.lists) for row in CASES.values())
    small = (seed for seed in table if len(seed.files[MODEL]) <= _SMALL)
    return (*(build() for build in _BUILDERS), *small)


def packed_arrays(**arrays: np.ndarray) -> bytes:
    """The bytes of a .npz file."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def _made(graph: Graph, *lists: str, model: onnx.ModelProto | None = None, **files: bytes) -> Seed:
    proto = graph.model() if model is None else model
    arrays = {ARRAYS: packed_arrays(**graph.feeds(0))} if graph.inputs else {}
    return Seed({MODEL: proto.SerializeToString(), RECIPE: _RECIPE.encode(), **arrays, **files}, lists or _LINEAR)


@_seed
def linears() -> Seed:
    """Gemm, MatMul with bias, a weight behind a Transpose, and one that two products share."""
    make = Graph()
    x = make.input("b", 16)
    h = make.one("Gemm", x, make.floats(24, 16), make.floats(24), transB=1, alpha=0.5)
    h = make.one("Relu", make.linear(h, 16, 24, bias=True))
    w = make.floats(16, 16)
    h = make.one("Add", make.one("MatMul", h, w), make.one("MatMul", x, make.one("Transpose", w, perm=[1, 0])))
    h = make.one("Mul", h, make.one("Reciprocal", make.one("Sqrt", make.one("ReduceMean", h, keepdims=1))))
    make.output(make.one("Identity", make.one("Dropout", h)), make.linear(h, 5, 16))
    return _made(make)


@_seed
def image() -> Seed:
    """Convolutions with what is folded into them, a hard swish written out, pooling, a classifier."""
    make = Graph()
    x = make.input("b", 3, 12, 12)
    h = make.one("Conv", x, make.floats(8, 3, 3, 3), make.floats(8), pads=[1, 1, 1, 1], strides=[2, 2])
    ones = [make.constant(np.abs(make.random.standard_normal(8)).astype(np.float32) + 0.5) for _ in range(4)]
    h = make.one("BatchNormalization", h, *ones, epsilon=1e-3)
    three, zero, six = (make.constant(np.float32(v)) for v in (3, 0, 6))
    gate = make.one("Clip", make.one("Add", h, three), zero, six)
    h = make.one("Div", make.one("Mul", h, gate), six)
    h = make.one("Conv", h, make.floats(8, 1, 3, 3), group=8, pads=[1, 1, 1, 1])
    h = make.one("ConvTranspose", make.one("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2]), make.floats(8, 8, 2, 2))
    h = make.one("Flatten", make.one("GlobalAveragePool", h))
    make.output(make.linear(h, 10, 8))
    return _made(make, "smooth,qdq,bias_correction", "qdq(provider=tensorrt)", "dynamic", "pack")


@_seed
def attention() -> Seed:
    """Heads split by computed shapes, a mask made by Where, a guarded softmax, keys turned between Reshapes."""
    make = Graph()
    x = make.input("b", "s", 16)
    batch = make.one("Gather", make.one("Shape", x), make.constant(np.array(0)), axis=0)
    axes, two, eight = (make.constant(np.array(v, np.int64)) for v in ([0], [2], [8]))
    rest = make.constant(np.array([-1], np.int64))
    shape = make.one("Concat", make.one("Identity", batch), rest, two, eight, axis=0)
    q, k, v = (make.one("Reshape", make.linear(x, 16, 16), shape) for _ in range(3))
    q, v = (make.one("Transpose", value, perm=[0, 2, 1, 3]) for value in (q, v))
    k = make.one("Transpose", k, perm=[0, 2, 3, 1])
    mask = make.one(
        "Where", make.constant(np.array(True)), make.constant(np.float32(0)), make.constant(np.float32(-1e4))
    )
    scores = make.one("Softmax", make.one("Add", make.one("MatMul", q, k), mask), axis=-1)
    scores = make.one("Where", make.one("IsNaN", scores), make.constant(np.float32(0)), scores)
    h = make.one("Transpose", make.one("MatMul", scores, v), perm=[0, 2, 1, 3])
    h = make.one("Reshape", h, make.constant(np.array([0, 0, 16])))
    h = make.one("LayerNormalization", make.linear(h, 16, 16), make.floats(16), make.floats(16))
    table = make.constant(np.ones(16, np.float32))
    a, b = make.op("Split", h, outputs=2, axis=-1)
    h = make.one("Mul", make.one("Concat", make.one("Neg", a), b, axis=-1), table)
    parts = make.op("Slice", h, axes, eight, make.constant(np.array([-1])))
    make.output(make.one("Expand", parts[0], make.constant(np.array([1, 1, 8]))), h)
    return _made(make)


@_seed
def bodies() -> Seed:
    """If, Loop and Scan with products in their bodies, one of an outer weight."""
    make = Graph()
    x, outer = make.input("b", 16), make.floats(16, 16)
    info = helper.make_tensor_value_info

    def body(name: str, operator: str, ins: list[onnx.ValueInfoProto], more: list[onnx.NodeProto]) -> onnx.GraphProto:
        source = ins[-1].name if ins else x
        inner = numpy_helper.from_array(make.random.standard_normal((16, 16)).astype(np.float32), f"{name}_w")
        nodes = [
            helper.make_node("MatMul", [source, f"{name}_w" if operator == "own" else outer], [f"{name}_h"], name),
            helper.make_node("Tanh", [f"{name}_h"], [f"{name}_y"]),
        ]
        outputs = [node.output[0] for node in more] + [f"{name}_y"]
        typed = [info(o, TensorProto.BOOL if o.endswith("go") else TensorProto.FLOAT, None) for o in outputs]
        return helper.make_graph([*more, *nodes], name, ins, typed, [inner] if operator == "own" else [])

    condition = make.one("Greater", make.one("ReduceMean", x, keepdims=0), make.constant(np.float32(0)))
    h = make.one("If", condition, then_branch=body("t", "own", [], []), else_branch=body("e", "outer", [], []))
    count = info("i", TensorProto.INT64, []), info("go_in", TensorProto.BOOL, [1]), info("l", TensorProto.FLOAT, None)
    go = [helper.make_node("Identity", ["go_in"], ["again_go"])]
    trips, true = make.constant(np.array(2)), make.constant(np.array(True))
    h = make.one("Loop", trips, true, h, body=body("loop", "own", list(count), go))
    step = body("scan", "outer", [info("row", TensorProto.FLOAT, [16])], [])
    make.output(make.one("Scan", h, body=step, num_scan_inputs=1), make.linear(h, 8, 16))
    return _made(make)


@_seed
def functions() -> Seed:
    """Nested model-local functions with attributes handed down, a default, and an optional input."""
    make = Graph()
    reference = onnx.AttributeProto(name="axis", ref_attr_name="turn", type=onnx.AttributeProto.INT)
    softmax = helper.make_node("Softmax", ["h"], ["y"])
    softmax.attribute.append(reference)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    product = [helper.make_node("MatMul", ["x", "w"], ["h"]), softmax]
    inner = helper.make_function("local", "Inner", ["x", "w"], ["y"], product, imports, ["turn"])
    call = helper.make_node("Inner", ["x", "w"], ["a"], domain="local")
    call.attribute.append(onnx.AttributeProto(name="turn", ref_attr_name="way", type=onnx.AttributeProto.INT))
    outer = helper.make_function(
        "local", "Outer", ["x", "w", "c"], ["y"], [call, helper.make_node("Add", ["a", "c"], ["y"])], imports, ["way"]
    )
    make.functions += [inner, outer]
    x = make.input("b", 16)
    for _ in range(3):
        x = make.one("Outer", x, make.floats(16, 16), make.floats(16), domain="local", way=-1)
    make.output(x)
    return _made(make, "pack", "qdq", "smooth,awq,gptq,pack")


@_seed
def beside() -> Seed:
    """Weights in a file of their own, one of them twice."""
    make = Graph()
    make.output(make.linear(make.one("Relu", make.linear(make.input("b", 32), 32, bias=True)), 16))
    model, data, offset = make.model(), b"", 0
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > 64:
            data += tensor.raw_data
            place = {"location": DATA, "offset": offset, "length": len(tensor.raw_data)}
            offset += len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    return _made(make, model=model, **{DATA: data})


@_seed
def types() -> Seed:
    """Every way to store a tensor: typed fields, float16, bfloat16, strings, int4 behind DequantizeLinear, empty."""
    make = Graph()
    make.opsets[""] = 21
    x = make.input("b", 16)

    def stored(kind: int, dims: list[int], values: list[object]) -> str:
        make.constants.append(helper.make_tensor(make.name("t"), kind, dims, values))
        return make.constants[-1].name

    plain = stored(TensorProto.FLOAT, [16, 8], make.random.standard_normal(128).tolist())
    half = stored(TensorProto.FLOAT16, [16, 8], make.random.standard_normal(128).tolist())
    brain = stored(TensorProto.BFLOAT16, [16, 8], make.random.standard_normal(128).tolist())
    codes = stored(TensorProto.INT4, [16, 8], make.random.integers(-8, 8, 128).tolist())
    stored(TensorProto.STRING, [2], [b"a", b"\xff"])
    stored(TensorProto.FLOAT, [0], [])
    stored(TensorProto.UINT64, [2], [1, 2])
    scale = stored(TensorProto.FLOAT, [8], [0.01] * 8)
    w = make.one("DequantizeLinear", codes, scale, axis=1)
    kept = [make.one("MatMul", x, weight) for weight in (plain, w)]
    kept += [make.one("MatMul", x, make.one("Cast", weight, to=TensorProto.FLOAT)) for weight in (half, brain)]
    lifted = make.one("Constant", value=numpy_helper.from_array(np.ones((8, 8), np.float32), "lifted"))
    make.output(make.one("MatMul", make.one("Sum", *kept), lifted))
    return _made(make, "pack", "qdq", "dynamic", "smooth,pack")


@_seed
def text() -> Seed:
    """A decoder of one layer with a tied head, and its tokenizer."""
    make = Graph()
    ids = make.input("b", "s", dtype=np.int64, draw=lambda random, shape: random.integers(0, 32, shape))
    make.inputs[0].name = "input_ids"
    make.makers = {"input_ids": make.makers[ids]}
    table = make.floats(32, 16)
    h = make.one("Gather", table, "input_ids", axis=0)
    h = make.one("Mul", h, make.floats(16, scale=1.0))
    h = make.one("Add", h, make.linear(make.one("Sigmoid", make.linear(h, 24, 16)), 16, 24))
    make.output(make.one("MatMul", h, make.one("Transpose", table, perm=[1, 0])))
    return _made(make, **{TOKENIZER: json.dumps(_TOKENIZER).encode()})


@_seed
def others() -> Seed:
    """Recurrent nets, Einsum, operators of ONNX Runtime, weights of ranks 1 and 3, several outputs of one node."""
    make = Graph()
    x = make.input("s", "b", 8)
    h = make.op("LSTM", x, make.floats(1, 16, 8), make.floats(1, 16, 4), make.floats(1, 32), outputs=3, hidden_size=4)
    h = make.one("Squeeze", h[0], make.constant(np.array([1])))
    h = make.one("GRU", h, make.floats(1, 12, 4), make.floats(1, 12, 4), hidden_size=4)
    h = make.one("Squeeze", h, make.constant(np.array([1])))
    h = make.one("Einsum", h, make.floats(4, 8), equation="sbk,kn->sbn")
    h = make.one("FusedMatMul", h, make.floats(8, 8), domain="com.microsoft", alpha=2.0, transB=1)
    h = make.one("Gelu", h, domain="com.microsoft")
    h = make.one("MatMul", h, make.floats(1, 8, 8))
    best = make.op("TopK", h, make.constant(np.array([4])), outputs=2, axis=-1)
    make.output(make.one("MatMul", best[0], make.floats(4)), make.one("MatMul", h, make.floats(8, 6)))
    return _made(make)


@_seed
def old() -> Seed:
    """Opset 9, with what later ones changed: attributes that became inputs, Upsample, weights among the inputs."""
    make = Graph()
    make.opsets[""] = 9
    x = make.input("b", 4, 6, 6)
    h = make.one("Clip", make.one("Conv", x, make.floats(4, 4, 3, 3)), min=0.0, max=6.0)
    h = make.one("Upsample", h, make.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    h = make.one("ReduceSum", make.one("Dropout", h, ratio=0.3), axes=[3], keepdims=1)
    h = make.one("Squeeze", make.one("Pad", h, pads=[0, 0, 0, 0, 0, 0, 1, 0], mode="constant"), axes=[3])
    parts = make.op("Split", make.one("Unsqueeze", h, axes=[1]), outputs=2, axis=2, split=[2, 2])
    h = make.one("Slice", parts[0], axes=[3], starts=[0], ends=[4])
    h = make.one("Flatten", make.one("Softmax", h, axis=1))
    make.output(make.one("Gemm", h, make.floats(8, 5), make.floats(1, 5)))
    model = make.model()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return _made(make, "pack", "smooth,qdq,bias_correction", "dynamic", model=model)
