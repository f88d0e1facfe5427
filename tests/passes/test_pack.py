"""The pass `pack`: operators in, operators out; numbers against the dequantized weights; reasons; sharing."""

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.passes.base import Decision, Region
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.runtime.sessions import run, session

K, N, V = 48, 33, 40
SPEC, EIGHT = QuantSpec(4, PerGroup(32)), QuantSpec(8, PerGroup(32))
ALL = Policy(SPEC, SPEC, SPEC)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, K)).astype(np.float32)
IDS = RNG.integers(0, V, (2, 3))


def _floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _model(body: str, **weights: np.ndarray) -> ir.Model:
    """x (2, 3, K), z (2, K, N) and ids (2, 3) through `body` to y (2, 3, n); nodes are named after their outputs."""
    inputs = f"float[2,3,{K}] x, float[2,{K},{N}] z, int64[2,3] ids"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[a,b,c] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(proto)


def _pack(model: ir.Model, policy: Policy = ALL) -> dict[str, Decision]:
    step, region = Pack(policy), Region.whole(model)
    step.call(region)
    step.call_rest(region.model)
    onnx.checker.check_model(ir.to_proto(model))
    assert len({decision.node for decision in step.decisions}) == len(step.decisions), "one decision a node"
    return {decision.node: decision for decision in step.decisions}


def _run(model: ir.Model) -> np.ndarray:
    made = session(ir.to_proto(model).SerializeToString(), threads=1, kernels="portable")
    feeds = {"x": X, "z": _floats(2, K, N), "ids": IDS}
    return run(made, ["y"], {given.name: feeds[given.name] for given in made.get_inputs()})[0]


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _types(model: ir.Model) -> Counter:
    return Counter(value.const_value.dtype.name for value in model.graph.initializers.values())


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def _decoded(w: np.ndarray, spec: QuantSpec = SPEC) -> np.ndarray:
    return round_to_nearest(w, spec, None).dequantize()


@pytest.mark.parametrize(
    ("spec", "operator", "types"),
    [
        (SPEC, "MatMulInt4", {"UINT4": 2, "FLOAT": 1}),
        (QuantSpec(4, PerGroup(16), symmetric=True), "MatMulInt4", {"INT4": 1, "FLOAT": 1}),
        (EIGHT, "MatMulInt8", {"UINT8": 2, "FLOAT": 1}),
        (QuantSpec(8, PerGroup(64), symmetric=True), "MatMulInt8", {"INT8": 1, "FLOAT": 1}),
    ],
    ids=str,
)
def test_a_linear_becomes_codes_and_scales(spec, operator, types) -> None:
    w = _floats(K, N)
    model = _model("y = MatMul(x, w)", w=w)
    decision = _pack(model, Policy(spec, None, None))["y"]
    assert _operators(model) == [operator]
    assert _types(model) == types, "the float weight is gone"
    assert list(model.functions) == [("qcompile", operator, "")]
    assert (decision.action, decision.reason) == ("quantized", str(spec))
    assert decision.detail["weights"] == K * N
    assert decision.detail["bytes"] == sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert decision.detail["bits_per_weight"] == spec.bits_per_weight(K)
    _close(_run(model), X @ _decoded(w, spec))


def test_a_transposed_weight_is_packed_as_k_by_n() -> None:
    w = _floats(N, K)
    model = _model("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", w=w)
    _pack(model)
    assert _operators(model) == ["MatMulInt4"]
    _close(_run(model), X @ _decoded(w.T))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_is_looked_up_in_codes(bits) -> None:
    table, spec = _floats(V, K), QuantSpec(bits, PerGroup(32))
    model = _model("y = Gather(w, ids)", w=table)
    decision = _pack(model, Policy(SPEC, None, spec))["y"]
    assert _operators(model) == [f"EmbeddingInt{bits}"]
    assert (decision.action, decision.detail["kind"], decision.detail["weights"]) == ("quantized", "Gather", V * K)
    _close(_run(model), _decoded(table.T, spec).T[IDS])


def test_a_shared_weight_is_stored_once() -> None:
    w = _floats(K, K)
    model = _model("a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)", w=w)
    decisions = _pack(model)
    assert _operators(model) == ["MatMulInt4", "Relu", "MatMulInt4"]
    first, last = (node for node in model.graph if node.domain == "qcompile")
    assert first.inputs[1:] == last.inputs[1:]
    assert len(model.graph.initializers) == 3
    assert decisions["a"].detail["weight"] == decisions["y"].detail["weight"] == "w"
    _close(_run(model), np.maximum(X @ _decoded(w), 0) @ _decoded(w))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed_first", [True, False])
def test_a_tied_table_is_one_set_of_codes(bits, transposed_first) -> None:
    spec, table = QuantSpec(bits, PerGroup(32)), _floats(V, K)
    head, lookup = "t = Transpose <perm = [1, 0]> (w) a = MatMul(x, t)", "e = Gather(w, ids)"
    body = f"{head} {lookup}" if transposed_first else f"{lookup} {head}"
    model = _model(f"{body} y = Concat <axis = 2> (a, e)", w=table)
    _pack(model, Policy(spec, spec, spec))
    operands = {node.op_type: node.inputs for node in model.graph if node.domain == "qcompile"}
    linear, embedding = operands[f"MatMulInt{bits}"], operands[f"EmbeddingInt{bits}"]
    assert linear[2].const_value is embedding[2].const_value, "one scale"
    for index in (1, 3):
        codes, seen = linear[index].const_value, embedding[index].const_value
        assert (codes is seen) == (bits == 8)
        assert codes.tobytes() == seen.tobytes(), "4-bit tables are read as bytes, the same ones"
    assert "w" not in model.graph.initializers
    decoded = _decoded(table.T, spec)
    _close(_run(model), np.concatenate([X @ decoded, decoded.T[IDS]], axis=2))


def test_a_float_table_stays_for_whom_it_is_kept() -> None:
    model = _model("e = Gather(w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t)", w=_floats(V, K))
    decisions = _pack(model, Policy(SPEC, SPEC, None))
    assert _operators(model) == ["Gather", "MatMulInt4"]
    assert (decisions["e"].action, decisions["e"].reason) == ("kept", "embedding is kept in float")
    assert "w" in model.graph.initializers


def test_symmetric_embeddings_have_no_operator() -> None:
    with pytest.raises(ValueError, match="always has zero points"):
        _pack(_model("y = Gather(w, ids)", w=_floats(V, K)), Policy(SPEC, None, QuantSpec(4, PerGroup(32), True)))


@pytest.mark.parametrize(
    ("body", "weights", "policy", "action", "reason"),
    [
        ("y = MatMul(x, w)", {"w": _floats(2, K, 2)}, ALL, "skipped", "the weight has rank 3, not 2"),
        ("y = MatMul(w, z)", {"w": _floats(3, K)}, ALL, "skipped", "the constant is the left operand"),
        ("y = MatMul(x, w)", {"w": _floats(K, N)}, Policy(SPEC, None, None, exclude=["w"]), "kept", "excluded by 'w'"),
        ("y = MatMul(x, w)", {"w": _floats(K, N)}, Policy(SPEC, None, None, ["q*"]), "kept", "not among the included"),
    ],
)
def test_what_is_left_alone_has_its_reason(body, weights, policy, action, reason) -> None:
    model = _model(body, **weights)
    before = _run(model)
    decision = _pack(model, policy)["y"]
    assert decision.action == action
    assert decision.reason.startswith(reason)
    assert decision.detail["weights"] == weights["w"].size
    assert _operators(model) == ["MatMul"]
    assert not model.functions
    np.testing.assert_array_equal(_run(model), before)


def test_products_of_activations_are_no_one_s_business() -> None:
    assert _pack(_model("y = MatMul(x, z)")) == {}
