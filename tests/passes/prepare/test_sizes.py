"""passes/prepare/sizes.py: what a computed shape holds, and which of them are the same; operators, numbers, reasons."""

import numpy as np
import onnx_ir as ir
import pytest
from preparing import check, operators, parse, reasons

from qcompile.passes.prepare import sizes as computed
from qcompile.passes.prepare.sizes import sizes

X = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)


@pytest.mark.parametrize(("shape", "told"), [([3], (5, 6, 8)), ([2, 3], None), (None, None)])
def test_a_shape_is_one_of_known_rank(shape: list[int] | None, told: tuple[int, ...] | None) -> None:
    """What has two axes, or nobody knows how many, is no list of sizes."""
    body = "s = Shape(x) k = Constant <value_ints = [8]> () c = Concat <axis = 0> (s, k) y = Reshape(x, c)"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> g (float[5, 6] x) => (float y) {{ {body} }}')
    shapes, _, joined, _ = model.graph
    shapes.outputs[0].shape, joined.outputs[0].shape = ir.Shape([2]), None if shape is None else ir.Shape(shape)
    for node in model.graph:
        if node.op_type == "Constant":
            node.outputs[0].const_value = ir.tensor([8])
    assert sizes(joined.outputs[0]) == told


# transpose_keys

TURN = """s = Shape(x) last = Constant <value = int64[1] {-1}> ()
    far = Constant <value = int64[1] {9223372036854775807}> ()
    two = Constant <value = int64[1] {-2}> () low = Constant <value = int64[1] {-9223372036854775808}> ()
    n = Slice(s, last, far) m = Slice(s, two, last) lead = Slice(s, low, two)
    first = Concat <axis = 0> (last, m, n) second = Concat <axis = 0> (lead, n, m) """


@pytest.mark.parametrize("lead", [(), (3,)])
def test_transpose_between_reshapes(lead):
    body = TURN + "a = Reshape(x, first) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape(b, second)"
    shapes = (",".join(map(str, ("A", *lead, *last))) for last in (("C", 8), (8, "C")))
    model = parse(body, *(f"float[{shape}] {name}" for name, shape in zip("xy", shapes, strict=True)))
    decisions = check(model, {"x": X if lead else X[:, 0]}, tolerance=0)
    assert operators(model) == ["Transpose"]
    rank = len(lead) + 3
    assert model.graph[0].attributes["perm"].as_ints() == (*range(rank - 2), rank - 1, rank - 2)
    assert reasons(decisions, "simplified") == ["1 Transposes between Reshapes became plain ones"]


def test_a_transpose_between_reshapes_keeps_the_names_of_sizes():
    body = TURN + "a = Reshape(x, first) b = Transpose <perm = [0, 2, 1]> (a) c = Reshape(b, second) y = Relu(c)"
    model = parse(body, "float[A,3,C,8] x", "float[A,3,8,C] y")
    check(model, {"x": X}, tolerance=0)
    assert operators(model) == ["Transpose", "Relu"]
    assert str(model.graph[0].outputs[0].shape) == "[A,3,8,C]"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("(last, m, n)", "(last, n, m)"), "the first shape is not"),
        (("(lead, n, m)", "(lead, m, n)"), "another one than that of the Transpose"),
        (("s = Shape(x)", "z = Transpose <perm = [0, 1, 2, 3]> (x) s = Shape(z)"), "the first shape is not"),
        (("(lead, n, m)", "(eight, n, m)"), "cannot be told"),
    ],
)
def test_other_reshapes_around_a_transpose_stay(change, reason):
    body = TURN + "a = Reshape(x, first) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape(b, second)"
    model = parse(body.replace(*change), "float[A,3,C,8] x", "float y", eight=np.int64([6]))
    model.graph.outputs[0].shape = ir.Shape([None] * (3 if "eight" in change[1] else 4))
    decisions = check(model, {"x": X}, tolerance=0)
    assert operators(model).count("Reshape") == 2
    assert reason in reasons(decisions, "kept")[0]


# merge_sizes

LENGTHS = """a = Shape <start = 1, end = 2> (p) b = Shape <start = 0, end = 1> (q) f = Shape(q)
    i = Constant <value = int64 {0}> () c = Gather(f, i) d = Squeeze(a) y = Concat <axis = 0> (a, b)
    z = Add(c, d) w = Add(d, c) v = Mul(z, w)"""


def test_sizes_that_all_caches_call_the_same_are_the_same():
    """Those of other inputs are not, whatever they are called: a query and a passage, both of length "T", say."""
    body = LENGTHS.replace("Shape(q)", "Shape(r)") + " m = Concat <axis = 2> (p, n) o = Concat <axis = 2> (q, n)"
    caches = "float[T,2,T,4] p, float[T,2,T,4] q, float[T,B] r, float[A,2,1,4] n"
    feeds = {name: np.ones((2, 2, 3, 4), np.float32) for name in "pq"}
    feeds |= {"r": np.ones((5, 3), np.float32), "n": np.ones((2, 2, 1, 4), np.float32)}
    for start, shapes in ((2, 2), (0, 3)):
        text = body.replace("start = 0, end = 1> (q)", f"start = {start}, end = {start + 1}> (q)")
        text = text.replace("start = 1, end = 2> (p)", "start = 2, end = 3> (p)")
        model = parse(text, caches, "int64[2] y, int64 v, float[A,2,C,4] m, float[A,2,C,4] o")
        check(model, feeds, tolerance=0)
        assert operators(model).count("Shape") == shapes


def test_an_input_of_which_many_sizes_are_asked_is_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(computed, "is_cache", lambda value: asked.append(value.name))
    body = " ".join(f"s{i} = Shape <start = {i % 4}, end = {i % 4 + 1}> (x)" for i in range(30))
    model = parse(
        f"{body} y = Concat <axis = 0> ({', '.join(f's{i}' for i in range(30))})", "float[a,b,c,d] x", "int64[30] y"
    )
    check(model, {"x": np.ones((2, 3, 4, 5), np.float32)}, tolerance=0)
    assert asked == ["x"]
    assert operators(model).count("Shape") == 4


@pytest.mark.parametrize("name", ["T", "S", "None"])
def test_sizes_of_other_inputs_are_other_sizes(name):
    model = parse(LENGTHS, f"float[A,T] p, float[{name},B] q", "int64[2] y, int64 v")
    if name == "None":  # which says nothing
        model.graph.inputs[0].shape, model.graph.inputs[1].shape = ir.Shape(["None"] * 2), ir.Shape(["None"] * 2)
    decisions = check(model, {"p": np.ones((2, 3), np.float32), "q": np.ones((5, 4), np.float32)}, tolerance=0)
    assert operators(model).count("Shape") == 3
    # Gather and Squeeze of the two give four values, of which the sums are the same.
    assert reasons(decisions, "merged") == ["1 nodes that compute what an earlier one does"]


def test_the_same_sizes_in_another_rank_stay_apart():
    body = """s = Shape(x) o = Constant <value = int64[1] {1}> () z = Constant <value = int64[1] {0}> ()
        y = Unsqueeze(s, o) w = Unsqueeze(s, z)"""
    model = parse(body, "float[A,B] x", "int64[2,1] y, int64[1,2] w")
    check(model, {"x": X[0, 0]}, tolerance=0)
    assert operators(model) == ["Shape", "Unsqueeze", "Unsqueeze"]
