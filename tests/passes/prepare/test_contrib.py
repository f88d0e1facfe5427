"""ONNX Runtime's fused operators with weights: taken apart with the same numbers, or left with a reason."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from graphs.table import Graph
from onnx import TensorProto, helper
from opened import opened
from preparing import check, operators, prepare, reasons

from qcompile.compiler.data.graph_inputs import caches
from qcompile.passes.base import Decision
from qcompile.passes.linears import find_embeddings, find_linears
from qcompile.passes.prepare import contrib_attention
from qcompile.passes.state import node_state

MS = "com.microsoft"
B, S, D, N, P = 2, 5, 32, 4, 3


def _checked(make: Graph, *outputs: str, tolerance: float = 2e-6) -> tuple[ir.Model, list[Decision]]:
    """Prepared, with the shapes of outputs as ONNX Runtime finds them."""
    make.output(*outputs)
    proto = make.model()
    proto.ir_version = 10
    session = opened(proto.SerializeToString())
    for output, array in zip(proto.graph.output, session.run(None, make.feeds(1)), strict=True):
        output.CopyFrom(
            helper.make_tensor_value_info(output.name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
    model = ir.from_proto(proto)
    return model, check(model, make.feeds(1), tolerance=tolerance)


def _integers(make: Graph, *shape: int, below: int = 2, dtype: type = np.int32) -> str:
    return make.input(*shape, dtype=dtype, draw=lambda random, size: random.integers(0, below, size))


def _given(make: Graph, array: np.ndarray) -> str:
    return make.input(*array.shape, dtype=array.dtype, draw=lambda random, size: array)


@pytest.mark.parametrize("operator", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize(("flip_x", "flip_w", "alpha"), itertools.product([0, 1], [0, 1], [1.0, 0.5]))
def test_fused_matmul(flip_x, flip_w, alpha, operator):
    make = Graph()
    x = make.input(2, *((8, 7) if flip_x else (7, 8)))
    w = make.floats(*((9, 8) if flip_w else (8, 9)))
    y = make.one(operator, x, w, domain=MS, transA=flip_x, transB=flip_w, alpha=alpha)
    model, _ = _checked(make, y)
    assert operators(model) == ["Transpose"] * flip_x + ["MatMul"]
    assert find_linears(model.graph)[0].shape == (8, 9)


def test_fused_matmul_of_a_shared_weight_scales_the_product():
    make = Graph()
    w = make.floats(400, 64)
    e = make.one("Gather", w, _integers(make, 3, below=400, dtype=np.int64))
    model, _ = _checked(make, make.one("FusedMatMul", e, w, domain=MS, transB=1, alpha=0.5))
    assert operators(model) == ["Gather", "Transpose", "MatMul", "Mul"]
    assert find_linears(model.graph)[0].weight is find_embeddings(model.graph)[0].table


def test_fused_matmul_on_the_left():
    make = Graph()
    model, _ = _checked(
        make, make.one("FusedMatMul", make.floats(40, 50), make.input(40, 3), domain=MS, transA=1, alpha=2.0)
    )
    assert operators(model) == ["Transpose", "MatMul", "Transpose"]
    assert len(find_linears(model.graph)) == 1


def test_fused_matmul_that_stays():
    make = Graph()
    x, w = make.input(5, 2, 8), make.floats(2, 9, 8)
    y = make.one("FusedMatMul", x, w, domain=MS, transB=1, transBatchA=1)
    a = make.one("FusedMatMul", make.input(2, 8), make.input(9, 8), domain=MS, transB=1)
    model, decisions = _checked(make, y, a)
    assert operators(model) == ["FusedMatMul"] * 2
    reason = "FusedMatMul cannot be taken apart: it turns its batch axes round"
    assert reasons(decisions, "skipped") == [reason]
    assert [node_state(node).left for node in model.graph] == [reason, ""]


ACTIVATIONS = {
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "Softplus": {},
    "Softsign": {},
    "Elu": {"activation_alpha": 0.3},
    "LeakyRelu": {"activation_alpha": 0.3},
    "ThresholdedRelu": {"activation_alpha": 0.3},
    "HardSigmoid": {"activation_alpha": 0.3, "activation_beta": 0.4},
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_gemm(activation):
    make = Graph()
    x, w, b = make.input(3, 8), make.floats(9, 8), make.floats(9)
    told = {"activation": activation, "transB": 1, "alpha": 0.5, "beta": 2.0}
    model, _ = _checked(make, make.one("FusedGemm", x, w, b, domain=MS, **told, **ACTIVATIONS[activation]))
    assert operators(model) == ["MatMul", "Add", activation]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"activation": "Gelu"}, "its activation is Gelu"),
        ({"activation": "HardSigmoid", "activation_alpha": 0.3}, "its activation is HardSigmoid"),
        ({}, "its activation is not told"),
    ],
)
def test_fused_gemm_that_stays(told, reason):
    make = Graph()
    make.output(make.one("FusedGemm", make.input(3, 8), make.floats(8, 9), domain=MS, **told))
    model = ir.from_proto(make.model())
    model.graph.outputs[0].shape = ir.Shape([3, 9])
    assert reasons(prepare(model), "skipped") == [f"FusedGemm cannot be taken apart: {reason}"]
    assert operators(model) == ["FusedGemm"]


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Clip"])
@pytest.mark.parametrize("summed", [False, True])
def test_fused_conv(activation, summed):
    make = Graph()
    x, w, b = make.input(2, 4, 6, 6), make.floats(8, 4, 3, 3), make.floats(8)
    more = [make.input(2, 8, 6, 6)] if summed else []
    parameters = {"LeakyRelu": [0.3], "HardSigmoid": [0.3, 0.4], "Clip": [-0.1, 0.2]}.get(activation)
    told = {"activation": activation, "pads": [1, 1, 1, 1]} | ({"activation_params": parameters} if parameters else {})
    model, _ = _checked(make, make.one("FusedConv", x, w, b, *more, domain=MS, **told), tolerance=1e-5)
    assert operators(model) == ["Conv"] + ["Add"] * summed + [activation]


MASKS = {
    "none": None,
    "lengths": np.array([3, 5], np.int32),
    "starts and cumulated lengths": np.array([3, 5, 0, 3, 8, 0, 3, 8], np.int32),
    "of keys": np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], np.int32),
    "of queries and keys": np.tril(np.ones((B, S, S), np.int32)),
    "of nothing": np.zeros((B, S), np.int32),
}


def _attention(make: Graph, mask: str = "", past: str = "", added: str = "", *, outputs: int = 1, **more) -> list[str]:
    sizes = more.get("qkv_hidden_sizes", [D] * 3)
    x, w, b = make.input(B, S, D), make.floats(D, sum(sizes), scale=0.2), make.floats(sum(sizes))
    operands = [x, w, b, mask, past, added]
    while not operands[-1]:
        operands.pop()
    return make.op("Attention", *operands, domain=MS, num_heads=N, outputs=outputs, **more)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention_with_masks(mask, unidirectional):
    make = Graph()
    given = "" if MASKS[mask] is None else _given(make, MASKS[mask])
    model, _ = _checked(make, *_attention(make, given, unidirectional=unidirectional))
    assert operators(model) == ["MatMul", "Add", "Split", "MultiHeadAttention"]
    assert [linear.shape for linear in find_linears(model.graph)] == [(D, 3 * D)]


@pytest.mark.parametrize(
    "more",
    [
        {"scale": 0.7},
        {"qkv_hidden_sizes": [32, 32, 48]},
        {"qkv_hidden_sizes": [16, 16, 48]},
        {"mask_filter_value": -50.0},
    ],
)
def test_attention_with_attributes(more):
    make = Graph()
    model, _ = _checked(make, *_attention(make, _given(make, MASKS["of keys"]), **more))
    assert "Attention" not in operators(model)


@pytest.mark.parametrize("heads", [1, B])
def test_attention_with_an_added_bias(heads):
    make = Graph()
    model, _ = _checked(make, *_attention(make, _given(make, MASKS["of keys"]), "", make.input(heads, N, S, S)))
    assert operators(model)[-1] == "MultiHeadAttention"


@pytest.mark.parametrize("mask", ["none", "of keys", "lengths"])
def test_attention_with_a_past(mask):
    make = Graph()
    masks = {"of keys": np.tril(np.ones((B, S + P), np.int32)), "lengths": np.array([6, 8], np.int32)}
    given = _given(make, masks[mask]) if mask in masks else ""
    past = make.input(2, B, N, P, D // N)
    model, _ = _checked(make, *_attention(make, given, past, outputs=2, unidirectional=1))
    assert "Attention" not in operators(model)
    assert operators(model)[-1] == "Concat"
    ((cache, present, axis),) = caches(model.graph)
    assert (cache.name, present, axis) == (past, model.graph.outputs[1].name, 3)


def test_attention_with_a_present_alone():
    make = Graph()
    model, _ = _checked(make, *_attention(make, outputs=2))
    assert operators(model)[-2:] == ["Unsqueeze", "Concat"]


@pytest.mark.parametrize("used", ["not there", "not read", "read", "given", "read and given"])
def test_a_present_is_made_where_it_is_used(used):
    make = Graph()
    y, *present = _attention(make, outputs=1 if used == "not there" else 2)
    if used.startswith("read"):
        y = make.one("Add", y, make.one("ReduceSum", present[0], keepdims=0))
    model, _ = _checked(make, y, *(present if used.endswith("given") else ()))
    (node,) = (own for own in model.graph if own.op_type == "MultiHeadAttention")
    assert len(node.outputs) == (1 if used.startswith("not") else 3)
    assert ("Concat" in operators(model)) == (not used.startswith("not"))


@pytest.mark.parametrize("used", ["not read", "read", "given", "read and given"])
def test_lengths_are_counted_where_they_are_used(used):
    make = Graph()
    ids, tables = _integers(make, B, S, below=20), (make.floats(20, 16), make.floats(12, 16))
    mask = _given(make, np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 2]], np.int32))
    operands = [ids, "", *tables, "", make.floats(16), make.floats(16), mask]
    y, lengths = make.op("EmbedLayerNormalization", *operands, domain=MS, outputs=2)
    if used.startswith("read"):
        y = make.one("Add", y, make.one("ReduceSum", make.one("Cast", lengths, to=TensorProto.FLOAT), keepdims=0))
    if used.endswith("given"):
        make.outputs.append(helper.make_tensor_value_info(lengths, TensorProto.INT32, None))
    model, _ = _checked(make, y)
    assert ("Equal" in operators(model)) == (used != "not read")
    assert "EmbedLayerNormalization" not in operators(model)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [(np.array([4, 5, 1, 0], np.int32), "its mask may hold starts and ends")],
)
def test_attention_that_stays(mask, reason):
    make = Graph()
    model, decisions = _checked(make, *_attention(make, _given(make, mask)))
    assert operators(model) == ["Attention"]
    assert reasons(decisions, "skipped") == [f"Attention cannot be taken apart: {reason}"]
    assert reason in node_state(model.graph[0]).left


@pytest.mark.parametrize(
    ("shape", "producer", "reason"),
    [
        ((2, 5), "", ""),
        ((2, 5, 5), "", ""),
        ((2, 1, 5, 5), "", "its mask has 4 axes"),
        ((4,), "", "its mask may hold starts and ends"),
        (None, "", "the form of its mask is unknown"),
        (None, "Cast", "the form of its mask is unknown"),
        (None, "EmbedLayerNormalization", ""),
        ((2, 1, 5, 5), "EmbedLayerNormalization", "its mask has 4 axes"),
    ],
)
def test_which_masks_an_attention_is_taken_apart_with(shape, producer, reason):
    x, weight, mask = (ir.Value(name=name) for name in ("x", "w", "m"))
    x.shape = ir.Shape((2, 5, 8))
    node = ir.node("Attention", [x, weight, None, mask], {"num_heads": 2}, domain=MS)
    if producer:
        mask = ir.node(producer, [x], num_outputs=2, domain=MS).outputs[1]
    mask.shape = None if shape is None else ir.Shape(shape)
    assert contrib_attention._problem(node, weight, mask, {weight}) == reason
    assert contrib_attention._problem(node, weight, None, {weight}) == ""
    assert contrib_attention._problem(node, weight, mask, set()) == "its weights are computed"
    assert contrib_attention._problem(node, None, mask, set()) == "its weights are computed"


@pytest.mark.parametrize(
    ("sizes", "length"),
    [((4, 2), False), ((2, 2), True), ((8, 2), True), (("b", "b"), True), (("n", "b"), False), ((None, "b"), False)],
)
def test_masks_of_one_axis(sizes, length):
    """(B,) and (3 B + 2,) are lengths, (2 B,) are starts and ends; of unlike names nothing is known."""
    mask, x = (
        ir.Value(name=name, shape=ir.Shape(shape)) for name, shape in [("m", sizes[:1]), ("x", (sizes[1], 5, 8))]
    )
    assert contrib_attention._is_length(mask, x) is length
    assert contrib_attention._is_length(mask, None) is False


def test_attention_of_computed_weights_is_none_of_ours():
    make = Graph()
    x, w, b = make.input(B, S, D), make.input(D, 3 * D), make.input(3 * D)
    model, decisions = _checked(make, make.one("Attention", x, w, b, domain=MS, num_heads=N))
    assert operators(model) == ["Attention"]
    assert not reasons(decisions, "skipped")


@pytest.mark.parametrize("places", [None, 1, B])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_embeddings(places, segments, masked):
    make = Graph()
    ids, words, positions = _integers(make, B, S, below=20), make.floats(20, 16), make.floats(12, 16)
    kinds = [_integers(make, B, S), make.floats(2, 16)] if segments else ["", ""]
    mask = _given(make, np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 2]], np.int32)) if masked else ""
    operands = [ids, kinds[0], words, positions, kinds[1], make.floats(16), make.floats(16), mask]
    operands += [_integers(make, places, S, below=12)] if places else []
    y, lengths, total = make.op("EmbedLayerNormalization", *operands, domain=MS, epsilon=1e-3, outputs=3)
    make.outputs.append(helper.make_tensor_value_info(lengths, TensorProto.INT32, None))
    model, _ = _checked(make, y, total)
    assert len(find_embeddings(model.graph)) == 2 + segments
    assert "LayerNormalization" in operators(model)
    assert "EmbedLayerNormalization" not in operators(model)


def test_a_whole_layer_of_an_optimized_encoder():
    """Lengths from the embeddings go to the attention as its mask."""
    make = Graph()
    ids, kinds = _integers(make, B, S, below=20), _integers(make, B, S)
    tables = make.floats(20, D), make.floats(12, D), make.floats(2, D)
    mask = _given(make, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32))
    norm = make.floats(D, scale=1.0), make.floats(D)
    x, lengths = make.op("EmbedLayerNormalization", ids, kinds, *tables, *norm, mask, domain=MS, outputs=2)
    a = make.one("Attention", x, make.floats(D, 3 * D), make.floats(3 * D), lengths, domain=MS, num_heads=N)
    y = make.one("SkipLayerNormalization", make.one("MatMul", a, make.floats(D, D)), x, *norm, domain=MS)
    model, _ = _checked(make, y, tolerance=1e-5)
    assert [linear.shape for linear in find_linears(model.graph)] == [(D, 3 * D), (D, D)]
    assert len(find_embeddings(model.graph)) == 3
