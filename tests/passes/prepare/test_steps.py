"""The small passes of `prepare` together, on small graphs: operators out, numbers as before, reasons for what stays."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from qcompile.models.tiny import tiny_branch, tiny_conv, tiny_decoder
from qcompile.passes.base import Decision, Region
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_embeddings, find_linears
from qcompile.passes.prepare import Prepare
from qcompile.passes.prepare.folding import _CODES, ALREADY, note_computed, report_quantized
from qcompile.passes.state import node_state

K, N = 96, 200  # a float32 weight is over 64 KiB, where a second copy counts


def parse(
    body: str, *, inputs: str = "float[M,K] x", outputs: str = "float[M,N] y", opset: int = 21, **weights
) -> ir.Model:
    """A model from ONNX text, with arrays for its weights."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def prepare(model: ir.Model, **options: int) -> list[Decision]:
    step = Prepare(**options)
    step.call(Region.whole(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return step.decisions


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def check(model: ir.Model, feeds: dict[str, np.ndarray], *, tolerance: float = 1e-5, **options: int) -> list[Decision]:
    """Prepare the model; outputs within `tolerance` of the largest before."""
    before = run(model, feeds)
    signature = [[(v.name, v.type, v.shape) for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    decisions = prepare(model, **options)
    for old, new in zip(before, run(model, feeds), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_allclose(new, old, rtol=0, atol=tolerance * max(np.abs(old).max(initial=0), 1e-6))
    after = [[(v.name, v.type, v.shape) for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    assert after == signature
    return decisions


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def reasons(decisions: list[Decision], action: str) -> list[str]:
    return [decision.reason for decision in decisions if decision.action == action]


def weight(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


X = {"x": weight(5, K, seed=9)}


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("value = float[2] {1.5, 2}", [1.5, 2]),
        ("value_float = 1.5", 1.5),
        ("value_floats = [1.5, 2.0]", [1.5, 2]),
    ],
)
def test_constant_nodes_become_initializers(kind, array):
    model = parse(f"c = Constant <{kind}> () y = Add(x, c)", inputs="float[2] x", outputs="float[2] y")
    decisions = check(model, {"x": np.ones(2, np.float32)})
    assert operators(model) == ["Add"]
    np.testing.assert_array_equal(model.graph.initializers["c"].const_value.numpy(), np.array(array, np.float32))
    assert reasons(decisions, "lifted") == ["1 Constant nodes became initializers"]


def test_constant_that_is_an_output_stays():
    model = parse("y = Constant <value = float[2] {1, 2}> ()", inputs="", outputs="float[2] y")
    decisions = check(model, {})
    assert reasons(decisions, "kept") == ["the Constant is a graph output"]


def test_weights_of_branches_become_initializers_of_the_main_graph():
    model = tiny_branch()
    decisions = prepare(model)
    assert not any(graph.initializers for graph in model.graph.subgraphs())
    assert {"outer.weight", "then.weight"} <= set(model.graph.initializers)
    assert "1 weights of bodies into the main graph" in reasons(decisions, "lifted")


def test_equal_weights_of_two_branches_are_one():
    body = """y = If (flag) <
        then_branch = p () => (float[M,N] q) { q = Gemm <transB = 1> (x, v) },
        else_branch = r () => (float[M,N] s) { t = Transpose <perm = [1, 0]> (w) a = MatMul(x, t) s = Neg(a) }>"""
    for flag in (True, False):
        model = parse(body, inputs="float[M,K] x, bool flag", w=weight(N, K), v=weight(N, K))
        check(model, X | {"flag": np.array(flag)})
        linears = find_linears(model.graph.all_nodes())
        assert len(linears) == 2
        assert len({linear.weight for linear in linears}) == 1


def test_names_that_two_branches_share_are_kept_apart():
    """A weight called w in each branch, of other numbers and another shape, and an x that hides the outer one."""
    rng = np.random.default_rng(0)

    def branch(name: str, inner: int) -> onnx.GraphProto:
        weights = {"w": rng.standard_normal((K, inner)), "v": rng.standard_normal((inner, N))}
        nodes = [
            onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
            onnx.helper.make_node("MatMul", ["h", "v"], ["y"]),
        ]
        tensors = [onnx.numpy_helper.from_array(array.astype("f"), key) for key, array in weights.items()]
        return onnx.helper.make_graph(
            nodes, name, [], [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)], tensors
        )

    model = parse("z = Identity(x) u = Identity(flag)", inputs="float[M,K] x, bool flag", outputs="float[M,N] out")
    proto = ir.to_proto(model)
    del proto.graph.node[:]
    proto.graph.node.append(
        onnx.helper.make_node("If", ["flag"], ["out"], then_branch=branch("a", 24), else_branch=branch("b", 40))
    )
    for flag in (True, False):
        model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
        check(model, X | {"flag": np.array(flag)})
        names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
        assert len(set(names)) == len(names)
        assert len(find_linears(model.graph.all_nodes())) == 4


def test_default_inputs_become_constants():
    model = parse("y = MatMul(x, w)", inputs="float[M,K] x, float[96,200] w", w=weight(K, N))
    assert not find_linears(model.graph)
    decisions = prepare(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert len(find_linears(model.graph)) == 1
    assert "1 graph inputs with default values" in reasons(decisions, "fixed")[0]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("given", [False, True])
def test_inputs_of_adapters_stay_inputs(rank, given):
    """What may be of other sizes than its default is no weight: a LoRA of rank 0 or more, that an application loads."""
    body = "a = MatMul(x, p) b = MatMul(a, q) c = MatMul(x, w) y = Add(b, c)"
    inputs = f"float[M,K] x, float[{K},R] p, float[R,{N}] q"
    defaults = {"p": np.ones((K, rank), np.float32), "q": np.ones((rank, N), np.float32)}
    adapter = {"p": np.full((K, 5), 0.1, np.float32), "q": np.full((5, N), 0.1, np.float32)}
    model = parse(body, inputs=inputs, w=weight(K, N), **defaults)
    check(model, X | adapter if given else X)
    assert [value.name for value in model.graph.inputs] == ["x", "p", "q"]
    assert len(find_linears(model.graph)) == 1


def test_chain_of_moves_is_folded_into_the_weight():
    body = """s = Constant <value = int64[2] {200, -1}> () a = Constant <value = int64[1] {0}> ()
        r = Reshape(w, s) u = Unsqueeze(r, a) q = Squeeze(u, a) i = Identity(q) t = Transpose(i) c = Cast <to = 1> (t)
        d = Dropout(c) y = MatMul(x, d)"""
    model = parse(body, w=weight(N * K))
    check(model, X)
    assert operators(model) == ["MatMul"]
    (linear,) = find_linears(model.graph)
    np.testing.assert_array_equal(linear.read(), weight(N * K).reshape(N, K).T)
    assert isinstance(linear.weight.const_value, ir.LazyTensor)


@pytest.mark.parametrize(
    ("wanted", "allowzero"), [([0, -1], 0), ([-1, 0], 0), ([8, 2, 0], 0), ([4, 4, 4], 1), ([-1], 0)]
)
def test_reshape_follows_the_standard(wanted, allowzero):
    shape = (8, 2, 4) if len(wanted) == 3 and 0 in wanted else (16, 4)
    shape = (2, 8, 4) if wanted == [-1, 0] else shape
    body = f"z = Reshape <allowzero = {allowzero}> (w, s) y = Mul(z, x)"
    model = parse(body, inputs="float x", outputs="float[] y", w=weight(*shape), s=np.array(wanted, np.int64))
    whole = [shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    model.graph.outputs[0].shape = ir.Shape(np.empty(shape).reshape(whole).shape)
    check(model, {"x": np.array(2, np.float32)})
    assert operators(model) == ["Mul"]


def test_weight_of_a_transpose_and_others_keeps_one_copy():
    table = weight(N, K)
    body = "e = Gather(w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t)"
    model = parse(body, inputs="int64[M] ids", w=table)
    decisions = check(model, {"ids": np.arange(7)})
    assert operators(model) == ["Gather", "Transpose", "MatMul"]
    assert reasons(decisions, "kept") == ["w is also used without this Transpose; one copy of it is kept"]
    assert find_linears(model.graph)[0].weight is find_embeddings(model.graph)[0].table


def test_copied_embedding_is_tied_again():
    body = "e = Gather(w, ids) t = Transpose <perm = [1, 0]> (v) y = MatMul(e, t)"
    model = parse(body, inputs="int64[M] ids", w=weight(N, K), v=weight(N, K))
    decisions = check(model, {"ids": np.arange(7)})
    assert reasons(decisions, "merged") == ["the same values as w"]
    assert find_linears(model.graph)[0].weight is find_embeddings(model.graph)[0].table


def test_head_folded_into_a_copy_is_tied_again():
    table = weight(N, K)
    body = "e = Gather(w, ids) r = Relu(e) a = MatMul(e, v) b = MatMul(r, v) y = Add(a, b)"
    model = parse(body, inputs="int64[M] ids", w=table, v=np.ascontiguousarray(table.T))
    decisions = check(model, {"ids": np.arange(7)})
    assert reasons(decisions, "tied") == ["the transposed values of w"]
    first, second = find_linears(model.graph)
    assert first.weight is second.weight is find_embeddings(model.graph)[0].table
    assert operators(model).count("Transpose") == 1
    other = np.ascontiguousarray(table.T)
    other[-1, -1] += 1
    model = parse(body, inputs="int64[M] ids", w=table, v=other)
    assert not reasons(check(model, {"ids": np.arange(7)}), "tied")


def test_weights_that_subgraphs_capture():
    body = """c = Constant <value = float[1] {2}> () i = Identity(x) t = Transpose(w) a = MatMul(x, t)
        b = If (flag) <then_branch = p () => (float[M,K] q) { u = Mul(i, c) v = MatMul(u, w2) q = Relu(v) },
                       else_branch = r () => (float[M,K] s) { m = Transpose(w) n = MatMul(x, m) s = MatMul(n, w) }>
        y = MatMul(b, t)"""
    weights = {"w": weight(N, K), "w2": weight(K, K)}
    for flag in (True, False):
        model = parse(body, inputs="float[M,K] x, bool flag", outputs="float[M,N] y, float[M,N] a", **weights)
        check(model, X | {"flag": np.array(flag)})
        assert operators(model) == ["Transpose", "MatMul", "If", "MatMul"], "the subgraph needs w as it is"
        assert len(find_linears(model.graph.all_nodes())) == 5


def test_loops():
    body = """n = Constant <value = int64 {3}> () c = Constant <value = bool {1}> ()
        y = Loop (n, c, x) <body = b (int64 i, bool go, float[M,K] h) => (bool on, float[M,K] next)
            { on = Identity(go) t = Transpose(w) m = MatMul(h, t) g = Gemm(m, w) next = Tanh(g) }>"""
    model = parse(body, outputs="float[M,K] y", w=weight(K, K))
    decisions = check(model, X, tolerance=1e-4)
    assert operators(model) == ["Loop"]
    assert reasons(decisions, "split") == ["Gemm as MatMul"]
    assert len(find_linears(model.graph.all_nodes())) == 2


def test_initializer_that_is_an_output_stays():
    model = parse("t = Transpose(w) y = MatMul(x, t)", outputs="float[M,N] y, float[200,96] w", w=weight(N, K))
    decisions = check(model, X)
    assert "also used without" in reasons(decisions, "kept")[0]


def test_almost_equal_weights_stay_apart():
    other = weight(K, N)
    other[-1, -1] += 1
    model = parse("a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b)", w=weight(K, N), v=other)
    check(model, X)
    assert set(model.graph.initializers) == {"w", "v"}


def test_equal_transposes_of_one_weight_are_folded_once():
    body = (
        "s = Transpose(w) t = Transpose <perm = [1, 0]> (w) r = Relu(x) a = MatMul(x, s) b = MatMul(r, t) y = Add(a, b)"
    )
    model = parse(body, w=weight(N, K))
    check(model, X)
    assert len(model.graph.initializers) <= 2
    model = parse(body.replace(" <perm = [1, 0]>", ""), w=weight(N, K))
    check(model, X)
    assert operators(model) == ["Relu", "MatMul", "MatMul", "Add"]
    assert len(model.graph.initializers) == 1


def test_cast_weight_is_folded_only_for_a_linear():
    half = weight(K, N, dtype=np.float16)
    model = parse("c = Cast <to = 1> (w) y = MatMul(x, c)", w=half)
    check(model, X)
    assert operators(model) == ["MatMul"]
    model = parse("c = Cast <to = 1> (w) y = Add(x, c)", inputs="float[400,200] x", w=weight(400, N, dtype=np.float16))
    decisions = check(model, {"x": weight(400, N)})
    assert operators(model) == ["Cast", "Add"]
    assert "32 bits instead of 16" in reasons(decisions, "kept")[0]


def test_quantized_weight_is_left_alone():
    codes = np.random.default_rng(0).integers(-128, 127, (K, N)).astype(np.int8)
    model = parse("d = DequantizeLinear(w, s) y = MatMul(x, d)", w=codes, s=np.float32(0.1))
    decisions = check(model, X)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    assert reasons(decisions, "skipped") == ["the weight is already quantized"]


def test_outputs_keep_their_names_through_identities():
    """The value itself becomes one of them; what else is an output already, or an input, keeps its Identity."""
    body = "a = MatMul(x, w) y = Identity(a) z = Identity(a) u = Relu(a) o = Identity(x)"
    outputs = "float[M,N] y, float[M,N] z, float[M,N] u, float[M,K] o"
    model = parse(body, outputs=outputs, w=weight(K, N))
    check(model, X)
    assert operators(model) == ["MatMul", "Identity", "Relu", "Identity"]
    assert [value.name for value in model.graph.outputs] == ["y", "z", "u", "o"]


def test_casts_to_the_type_that_is_there_go():
    model = parse(
        "a = Cast <to = 1> (x) b = Cast <to = 10> (a) c = Cast <to = 1> (b) y = Relu(c)", outputs="float[M,K] y"
    )
    check(model, X)
    assert operators(model) == ["Cast", "Cast", "Relu"]


def test_dropout_in_training_and_used_masks_stay():
    body = "r = Constant <value = float {0.5}> () t = Constant <value = bool {1}> () d = Dropout(x, r, t) y = Relu(d)"
    model = parse(body, outputs="float[M,K] y")
    prepare(model)
    assert operators(model) == ["Dropout", "Relu"]
    model = parse("d, m = Dropout(x) y = Relu(d)", outputs="float[M,K] y, bool[M,K] m")
    check(model, X)
    assert operators(model) == ["Dropout", "Relu"]


def test_unused_and_unnamed():
    model = parse("u = Relu(x) v = Relu(x) y = MatMul(v, w)", w=weight(K, N), unused=weight(3, 3))
    for node in model.graph:
        node.name = ""
    check(model, X)
    assert operators(model) == ["Relu", "MatMul"]
    assert set(model.graph.initializers) == {"w"}
    names = [node.name for node in model.graph]
    assert len(set(names)) == 2
    assert names[1].startswith("MatMul")


def test_duplicate_node_names_become_unique():
    model = parse("u = Relu(x) y = MatMul(u, w)", w=weight(K, N))
    for node in model.graph:
        node.name = "same"  # which ONNX Runtime refuses
    prepare(model)
    assert [node.name for node in model.graph] == ["same", "same_1"]


def test_unsorted_graphs_are_sorted():
    model = parse("u = Relu(x) y = MatMul(u, w)", w=weight(K, N))
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)
    prepare(model)
    assert operators(model) == ["Relu", "MatMul"]


_IF = (
    f"p = Identity(c) g = If (p) <then_branch = t () => (float[{K},{N}] a) {{ a = Identity(w) }}, "
    f"else_branch = e () => (float[{K},{N}] b) {{ b = Identity(v) }}>"
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{_IF} y = MatMul(x, g)", "its weight is chosen by If If_node when the model runs"),
        (
            f"{_IF} r = Transpose(g) t = Transpose(r) y = MatMul(x, t)",
            "its weight is chosen by If If_node",
        ),
        (
            "p = Cast <to = 7> (c) q = Unsqueeze(p, z) s = Slice(w, z, q) y = MatMul(x, s)",
            "its weight is a part of a constant",
        ),
        ("u = MatMul(x, w) t = Transpose(x) y = MatMul(t, u)", ""),
        (f"{_IF} u = MatMul(x, w) t = Transpose(x) y = MatMul(t, u)", ""),
    ],
)
def test_products_of_chosen_weights_say_so(body: str, reason: str) -> None:
    """Those of two activations have nothing to say."""
    model = parse(
        body, inputs=f"float[M,{K}] x, bool c", outputs="float[A,B] y", w=weight(K, N), v=weight(K, N), z=np.array([0])
    )
    for node in model.graph:
        node.name = f"{node.op_type}_node"
    note_computed(model)
    told = node_state(next(node for node in reversed(model.graph) if node.op_type == "MatMul")).left
    assert told.startswith(reason)
    assert bool(told) is bool(reason)


def test_a_cycle_is_told_in_one_line():
    model = parse("u = Relu(x) v = Add(u, x) y = MatMul(v, w)", w=weight(K, N))
    model.graph[0].replace_input_with(0, model.graph[1].outputs[0])
    with pytest.raises(UserError, match="the graph has a cycle"):
        Prepare().call(Region.whole(model))


def test_model_local_functions_are_inlined():
    text = f"""<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[M,{K}] x) => (float[M,{N}] y)
        {{ y = local.Linear(x, w) }}
        <domain: "local", opset_import: ["" : 21]> Linear (a, b) => (c) {{ t = Transpose(b) c = MatMul(a, t) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(N, K), "w"))
    model = ir.from_proto(proto)
    decisions = check(model, X)
    assert operators(model) == ["MatMul"]
    assert "local.Linear" in reasons(decisions, "inlined")[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_keep_their_type(dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    model = parse("t = Transpose(w) y = MatMul(x, t)", inputs=f"{dtype}[M,K] x", outputs=f"{dtype}[M,N] y")
    tensor = ir.Tensor(weight(N, K).astype(kind), name="w")
    (value,) = [node.inputs[0] for node in model.graph if node.op_type == "Transpose"]
    value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape((N, K))
    model.graph.register_initializer(value)
    prepare(model)
    assert operators(model) == ["MatMul"]
    assert find_linears(model.graph)[0].weight.const_value.dtype == tensor.dtype


def test_tiny_models():
    ids = {"input_ids": np.arange(10)[None] % 7, "attention_mask": np.ones((1, 10), np.int64)}
    model = tiny_decoder()
    linears = len(find_linears(model.graph))
    check(model, ids)
    assert len(find_linears(model.graph)) == linears
    assert find_linears(model.graph)[-1].transposed
    check(tiny_decoder(dtype="fp16"), ids, tolerance=1e-3)
    model = tiny_conv()
    feeds = {v.name: weight(*(d if isinstance(d, int) else 2 for d in v.shape)) for v in model.graph.inputs}
    check(model, feeds)
    assert model.opset_imports[""] == 21


def test_idempotent():
    model = tiny_conv()
    prepare(model)
    before = ir.to_proto(model).SerializeToString()
    assert not [d for d in prepare(model) if d.action not in ("skipped", "kept")]
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rapidocr-det", "rapidocr-rec", "rapidocr-cls"])
def test_rapidocr(name, tmp_path):
    from qcompile.compiler.files.load import load_model, save_model
    from qcompile.models.zoo import fetch

    path: Path = fetch(name)
    model = load_model(path)
    prepare(model)
    report = save_model(model, tmp_path / "model.onnx")
    feeds = {model.graph.inputs[0].name: weight(1, 3, 48 if "det" not in name else 96, 192)}
    old, new = (ort.InferenceSession(str(file)).run(None, feeds)[0] for file in (path, report.paths[0]))
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path):
    import resource

    from qcompile.compiler.files.load import load_model

    rows, columns, count = 16384, 8192, 5  # 512 MiB each
    names = [f"w{i}" for i in range(count)]
    body = " ".join(f"t{i} = Transpose({n}) a{i} = MatMul(x, t{i})" for i, n in enumerate(names))
    outputs = ", ".join(f"float[M,{rows}] a{i}" for i in range(count))
    text = f'<ir_version: 7, opset_import: ["" : 12]> g (float[M,{columns}] x) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for i, name in enumerate(names):
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[rows, columns], raw_data=b"")
        onnx.external_data_helper.set_external_data(tensor, "w.data", i * rows * columns * 4, rows * columns * 4)
        tensor.ClearField("raw_data")
        proto.graph.initializer.append(tensor)
    with open(tmp_path / "w.data", "wb") as file:  # sparse: it takes a few blocks
        file.truncate(count * rows * columns * 4)
        for i in range(count):
            file.seek(i * rows * columns * 4)
            file.write(np.float32(i + 1).tobytes())
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    model = load_model(tmp_path / "model.onnx")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Prepare().call(Region.whole(model))
    assert operators(model) == ["MatMul"] * count
    assert len(model.graph.initializers) == count
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, "kilobytes: no weight was brought into memory"


@pytest.mark.parametrize("operator", _CODES)
def test_weights_that_come_as_codes_are_told_of(operator: str) -> None:
    """Where the operator's own definition has its weight; codes anywhere else are none."""
    names = {"b", "w", "weight", "data", "fc1_experts_weights"} | ({"x"} if operator == "DequantizeLinear" else set())
    known = [one for one in get_all_operator_schema() if one.name == operator and one.domain in ("", "com.microsoft")]
    schema = max(known, key=lambda one: one.since_version)
    (own,) = [place for place, one in enumerate(schema.inputs) if one.name.lower() in names][:1]
    for place in range(4):
        values = [ir.Value(name=f"v{i}") for i in range(4)]
        node, codes = ir.node(operator, values, domain=schema.domain), values.pop(place)
        codes.const_value = ir.tensor(np.zeros((4, 4), np.int8))
        graph = ir.Graph(values, node.outputs, nodes=[node], initializers=[codes])
        step = Prepare()
        report_quantized(ir.Model(graph, ir_version=10), step.decide)
        assert reasons(step.decisions, "skipped") == [ALREADY] * (place == own)


def test_a_matrix_that_a_scan_also_gives_out_is_looked_up():
    """Its body hands the matrix of each step on, beside reading it; ONNX Runtime gives zeros for what is no node's."""
    body = f"""s, y, z = Scan <num_scan_inputs = 1, body = step
        (float[5,{K}] c, float[{K},{K}] m) => (float[5,{K}] n, float[5,{K}] o, float[{K},{K}] m)
        {{ n = MatMul(c, m) o = Relu(n) }}> (x, w)"""
    matrices = weight(3, K, K) / np.float32(10)
    model = parse(body, inputs=f"float[5,{K}] x", outputs=f"float[3,5,{K}] y, float[3,{K},{K}] z", w=matrices)
    before = run(model, X)
    prepare(model)
    after = run(model, X)
    assert "Gather" in [node.op_type for node in model.graph.all_nodes()]
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after[1], matrices)
