"""passes/linears.py: which nodes count as linears, embeddings and heads, and why others do not."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.passes.formats.emit import floats
from qcompile.passes.linears import as_linear, find_embeddings, find_linears, is_lm_head, vocabulary_size

K, N, V = 6, 4, 10


def _model(body: str, outputs: str = "float y", **weights: np.ndarray) -> ir.Model:
    """x (2, 3, K), z (2, K, N) and ids (2, 3) through `body`; nodes are named after their outputs."""
    typed = ", ".join(f"{kind}[a,b,c] {name}" for kind, name in (part.split() for part in outputs.split(", ")))
    inputs = f"float[2,3,{K}] x, float[2,{K},{N}] z, int64[2,3] ids"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 21]> g ({inputs}) => ({typed}) {{ {body} }}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(proto)


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_constant_right_operand_makes_a_linear() -> None:
    w = _floats(K, N)
    (linear,) = find_linears(_model("y = MatMul(x, w)", w=w).graph)
    assert (linear.name, linear.shape, linear.transposed) == ("y", (K, N), False)
    assert (linear.activation.name, linear.weight.name) == ("x", "w")
    np.testing.assert_array_equal(linear.read(), w)


def test_what_was_read_does_not_stay_in_memory(tmp_path) -> None:
    """ONNX IR would keep the mapping of the file, with every page ever read, as long as the model lives."""
    model = _model("e = Gather(t, ids) y = MatMul(e, w)", t=_floats(V, K), w=_floats(K, N))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    (linear,), (embedding,) = find_linears(model.graph), find_embeddings(model.graph)
    np.testing.assert_array_equal(linear.read(), _floats(K, N))
    np.testing.assert_array_equal(floats(embedding.table), _floats(V, K))
    for value in (linear.weight, embedding.table):
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.raw is None


@pytest.mark.parametrize("attributes", ["", "<perm = [1, 0]>"])
def test_through_a_transpose(attributes) -> None:
    w = _floats(N, K)
    (linear,) = find_linears(_model(f"t = Transpose {attributes} (w) y = MatMul(x, t)", w=w).graph)
    assert (linear.shape, linear.transposed, linear.weight.name) == ((K, N), True, "w")
    np.testing.assert_array_equal(linear.read(), w.T)


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = MatMul(x, z)", {}, "no constant weight (a product of two activations)"),
        ("y = MatMul(w, z)", {"w": _floats(3, K)}, "the constant is the left operand"),
        ("y = MatMul(x, w)", {"w": _floats(2, K, N)}, "the weight has rank 3, not 2"),
        ("y = MatMul(x, w)", {"w": _floats(K)}, "the weight has rank 1, not 2"),
        ("i = Cast <to = 6> (x) y = MatMul(i, w)", {"w": np.ones((K, N), np.int32)}, "the weight is INT32"),
        ("t = Transpose <perm = [0, 1]> (w) y = MatMul(x, t)", {"w": _floats(K, N)}, "no constant weight"),
    ],
)
def test_others_have_their_reason(body, weights, reason) -> None:
    node = next(node for node in _model(body, **weights).graph if node.op_type == "MatMul")
    found = as_linear(node)
    assert isinstance(found, str)
    assert found.startswith(reason)
    assert not find_linears([node])


def test_an_initializer_that_callers_may_replace_is_no_weight() -> None:
    model = _model("y = MatMul(x, w)", w=_floats(K, N))
    model.graph.inputs.append(model.graph.initializers["w"])
    assert not find_linears(model.graph)


def test_half_precision_is_read_as_single() -> None:
    (linear,) = find_linears(_model("y = MatMul(x, w)", w=_floats(K, N).astype(np.float16)).graph)
    assert linear.read().dtype == np.float32
    np.testing.assert_array_equal(linear.read(), _floats(K, N).astype(np.float16))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gather(w, ids)", True),
        ("y = Gather <axis = 0> (w, ids)", True),
        ("y = Gather <axis = 1> (w, ids)", False),
        ("y = Gather <axis = -1> (w, ids)", False),
        ("y = Gather(w, fixed)", False),
        ("y = Gather(integers, ids)", False),
        ("y = Gather(cube, ids)", False),
        ("y = Gather(x, ids)", False),
    ],
)
def test_embeddings_are_lookups_of_rows(body, found) -> None:
    tables = {"w": _floats(V, K), "integers": np.ones((V, K), np.int64), "cube": _floats(V, K, 2)}
    embeddings = find_embeddings(_model(body, fixed=np.array([1, 2]), **tables).graph)
    assert [embedding.shape for embedding in embeddings] == [(V, K)] * found
    assert [embedding.table.name for embedding in embeddings] == ["w"] * found


def test_vocabulary_is_the_largest_table() -> None:
    body = "a = Gather(positions, ids) b = Gather(w, ids) y = Add(a, b)"
    assert vocabulary_size(_model(body, positions=_floats(5, K), w=_floats(V, K))) == V
    assert vocabulary_size(_model("y = MatMul(x, w)", w=_floats(K, V))) is None


@pytest.mark.parametrize(
    ("body", "outputs", "head"),
    [
        ("y = MatMul(x, w)", "float y", True),
        ("a = MatMul(x, w) b = Add(a, bias) c = Mul(b, bias) d = Tanh(c) y = Identity(d)", "float y", True),
        ("a = MatMul(x, w) y = Softmax(a)", "float y", False),
        ("a = MatMul(x, w) b = Tanh(a) y = Add(a, b)", "float y", False),
        ("a = MatMul(x, w) y = MatMul(a, back)", "float y", False),
        ("a = MatMul(x, w) b = Neg(a) y = Identity(a)", "float y, float b", False),
    ],
)
def test_a_head_is_as_wide_as_the_vocabulary_and_ends_the_graph(body, outputs, head) -> None:
    weights = {"w": _floats(K, V), "back": _floats(V, K), "bias": _floats(V)}
    linear = find_linears(_model(body, outputs, **weights).graph)[0]
    assert is_lm_head(linear, V) == head
    assert not is_lm_head(linear, None)
    assert not is_lm_head(linear, V + 1)


def test_a_decoder_has_one_head_and_one_embedding() -> None:
    model = tiny_decoder(layers=1)
    vocabulary = vocabulary_size(model)
    assert vocabulary == 256
    assert [linear.name for linear in find_linears(model.graph) if is_lm_head(linear, vocabulary)] == ["lm_head"]
    assert [embedding.name for embedding in find_embeddings(model.graph)] == ["model.embed_tokens"]
