"""Every Gemm with a constant weight is a MatMul and an Add, with the same numbers."""

import itertools

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from opened import opened

from qcompile.passes.base import Decision, Region
from qcompile.passes.linears import find_embeddings, find_linears
from qcompile.passes.prepare import Prepare

M, K, N = 5, 16, 24
RNG = np.random.default_rng(0)
BIASES = {"none": None, "()": (), "(N,)": (N,), "(1,N)": (1, N), "(M,1)": (M, 1), "(M,N)": (M, N)}


def _array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _gemm(attributes: str, operands: str, inputs: str, n: int = N, **weights: np.ndarray) -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["" : 21]> g ({inputs}) => (float[M,{n}] y) {{ {operands} }}'
    proto = onnx.parser.parse_model(text.replace("GEMM", f"Gemm <{attributes}>"))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in proto.graph.node:
        node.name = f"fc_{node.output[0]}"
    return ir.from_proto(proto)


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = opened(model)
    return session.run(["y"], feeds)[0]


def _check(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[Decision]:
    before = _run(model, feeds)
    step = Prepare()
    step.call(Region.whole(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(_run(model, feeds), before, rtol=0, atol=1e-5 * np.abs(before).max())
    return step.decisions


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("trans_a", "trans_b", "alpha", "beta"), itertools.product([0, 1], [0, 1], [1, 0.5], [1, -2, 0])
)
def test_constant_weight_and_bias(trans_a, trans_b, alpha, beta, bias):
    weights = {"w": _array(N, K) if trans_b else _array(K, N)}
    if BIASES[bias] is not None:
        weights["c"] = _array(*BIASES[bias])
    x = "x, w" if BIASES[bias] is None else "x, w, c"
    attributes = f"transA = {trans_a}, transB = {trans_b}, alpha = {float(alpha)}, beta = {float(beta)}"
    model = _gemm(attributes, f"y = GEMM({x})", f"float[{'K,M' if trans_a else 'M,K'}] x", **weights)
    _check(model, {"x": _array(K, M) if trans_a else _array(M, K)})
    has_bias = BIASES[bias] is not None and beta != 0
    assert _operators(model) == ["Transpose"] * trans_a + ["MatMul"] + ["Add"] * has_bias
    (linear,) = find_linears(model.graph)
    assert linear.name == "fc_y"
    assert linear.shape == (K, N)
    assert not linear.transposed
    assert [node.name for node in model.graph if node.op_type == "Add"] == ["fc_y_bias"] * has_bias
    assert isinstance(linear.weight.const_value, ir.LazyTensor) == bool(trans_b or alpha != 1)


@pytest.mark.parametrize("beta", [1, -2])
def test_computed_bias(beta):
    model = _gemm(f"beta = {float(beta)}", "y = GEMM(x, w, c)", f"float[M,K] x, float[M,{N}] c", w=_array(K, N))
    _check(model, {"x": _array(M, K), "c": _array(M, N)})
    assert _operators(model) == (["MatMul", "Add"] if beta == 1 else ["MatMul", "Mul", "Add"])


def test_computed_weight_is_left_alone():
    model = _gemm("alpha = 0.5", "y = GEMM(x, w)", f"float[M,K] x, float[K,{N}] w")
    decisions = _check(model, {"x": _array(M, K), "w": _array(K, N)})
    assert _operators(model) == ["Gemm"]
    (reason,) = [decision for decision in decisions if decision.action == "skipped"]
    assert (reason.node, reason.reason) == ("fc_y", "no operand of the Gemm is a constant")


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_tied_embedding_keeps_its_one_copy(alpha):
    body = "e = Gather(w, ids) y = GEMM(e, w)"
    model = _gemm(f"transB = 1, alpha = {alpha}", body, "int64[M] ids", w=_array(N, K))
    _check(model, {"ids": np.arange(M)})
    assert _operators(model) == ["Gather", "Transpose", "MatMul"] + ["Mul"] * (alpha != 1)
    (linear,) = find_linears(model.graph)
    assert linear.transposed
    assert linear.weight is find_embeddings(model.graph)[0].table


def test_transposed_twice():
    body = "e = Gather(w, ids) t = Transpose <perm = [1, 0]> (w) z = GEMM(e, t) y = Relu(z)"
    model = _gemm("transB = 1", body, "int64[M] ids", n=160, w=_array(160, 160))
    _check(model, {"ids": np.arange(M)})
    (linear,) = find_linears(model.graph)
    assert linear.weight is find_embeddings(model.graph)[0].table


def test_two_gemms_of_one_weight_share_its_transpose():
    body = "a = GEMM(x, w, b) c = GEMM(z, w, b) y = Add(a, c)"
    model = _gemm("transB = 1", body, "float[M,K] x, float[M,K] z", w=_array(N, K), b=_array(N))
    _check(model, {"x": _array(M, K), "z": _array(M, K)})
    first, second = find_linears(model.graph)
    assert first.weight is second.weight
    assert set(model.graph.initializers) == {"w_transposed", "b"}


def test_gemm_that_is_its_own_operand_twice():
    model = _gemm("transA = 1", "y = GEMM(w, w)", f"float[{N}] unused", w=_array(K, N))
    step = Prepare()
    step.call(Region.whole(model))
    assert "MatMul" in _operators(model)


def test_integers_are_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 21]> g (int32[M,{K}] x) => (int32[M,{N}] y) {{ y = Gemm(x, w) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((K, N), np.int32), "w"))
    model, step = ir.from_proto(proto), Prepare()
    step.call(Region.whole(model))
    assert _operators(model) == ["Gemm"]
    assert step.decisions[-1].reason == "the Gemm is of type INT32"
