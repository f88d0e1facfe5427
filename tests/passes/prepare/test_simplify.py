"""`divide` to `group_heads` of `prepare`: operators out, numbers as before, reasons for what stays."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompile.passes.base import Decision, Region
from qcompile.passes.prepare import Prepare
from qcompile.passes.prepare.simplify import sign_tables

X = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
F32_LOW = "-3.4028234663852886e38"


def parse(body: str, inputs: str, outputs: str, **weights) -> ir.Model:
    """A model from ONNX text, with arrays for its weights."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, node by node as the model says."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def check(model: ir.Model, feeds: dict[str, np.ndarray], *, tolerance: float = 1e-6) -> list[Decision]:
    """Prepare the model, twice; outputs within `tolerance` of the largest before, 0 meaning bit by bit."""
    before = run(model, feeds)
    step = Prepare()
    step.call(Region.whole(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for old, new in zip(before, run(model, feeds), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_allclose(new, old, rtol=0, atol=tolerance * np.nanmax(np.abs(old), initial=0))
    again = Prepare()
    again.call(Region.whole(model))
    assert not [d for d in again.decisions if d.action not in ("kept", "skipped")]
    return step.decisions


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def reasons(decisions: list[Decision], action: str) -> list[str]:
    return [decision.reason for decision in decisions if decision.action == action]


# divide

RMS = """two = Constant <value = float {2}> () eps = Constant <value = float {1e-5}> ()
    axes = Constant <value = int64[1] {-1}> () p = Pow(x, two) m = ReduceMean(p, axes) e = Add(m, eps) s = Sqrt(e)
    r = Reciprocal(s) """


def test_product_with_a_reciprocal_is_a_quotient():
    body = RMS + "n = Mul(x, r) k = Mul(r, x) g = Mul(n, gamma) y = Add(g, k)"
    model = parse(body, "float[A,B,C,8] x", "float[A,B,C,8] y", gamma=np.arange(8, dtype=np.float32))
    decisions = check(model, {"x": X})
    assert operators(model) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    assert reasons(decisions, "simplified") == ["2 Mul by a Reciprocal became Div"]
    assert reasons(decisions, "merged") == ["1 nodes that compute what an earlier one does"]


def test_onnx_runtime_fuses_the_quotient(tmp_path):
    model = parse(RMS + "n = Mul(x, r) y = Mul(g, n)", "float[A,B,C,8] x", "float[A,B,C,8] y", g=np.float32([1.5] * 8))
    Prepare().call(Region.whole(model))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert operators(ir.load(options.optimized_model_filepath)) == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Reciprocal(x) a = Mul(x, r) b = Neg(r) y = Add(a, b)", "also read by Neg"),
        ("r = Reciprocal(x) y = Mul(r, r)", "squares the Reciprocal"),
        ("r = Reciprocal(x) a = Relu(r) y = Abs(a)", "also read by Relu"),
        ("y = Reciprocal(x)", "a graph output"),
    ],
)
def test_reciprocal_of_others_stays(body, reason):
    model = parse(body, "float[A] x", "float[A] y")
    decisions = check(model, {"x": np.float32([1.5, -2])})
    assert "Reciprocal" in operators(model)
    assert reason in reasons(decisions, "kept")[0]


# merge_equal


def test_equal_nodes_are_merged():
    body = "a = Relu(x) b = Relu(x) c = Softmax <axis = 1> (a) d = Softmax <axis = 1> (b) e = Mul(c, k) y = Mul(e, d)"
    model = parse(body, "float[A,8] x", "float[A,8] y", k=np.float32(2))
    decisions = check(model, {"x": X[0, 0]}, tolerance=0)
    assert operators(model) == ["Relu", "Softmax", "Mul", "Mul"]
    assert reasons(decisions, "merged") == ["2 nodes that compute what an earlier one does"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Softmax <axis = 0> (x) b = Softmax <axis = 1> (x) y = Mul(a, b)",
        "a = Sub(x, k) b = Sub(k, x) y = Mul(a, b)",
        "a = RandomNormalLike (x) b = RandomNormalLike (x) c = Sub(a, b) d = Mul(c, k) y = Mul(d, z)",
        "a = Add(x, k) b = Add(x, l) y = Mul(a, b)",
    ],
)
def test_unequal_nodes_stay(body):
    constants = {"k": np.float32(2), "l": np.float32([2]), "z": np.float32(0)}
    model = parse(body, "float[A,8] x", "float[A,8] y", **{n: a for n, a in constants.items() if n in body})
    decisions = check(model, {"x": X[0, 0]}, tolerance=1e-3)
    assert not reasons(decisions, "merged")


def test_equal_outputs_keep_their_names():
    model = parse("y = Relu(x) z = Relu(x) w = Neg(z)", "float[A] x", "float[A] y, float[A] z, float[A] w")
    check(model, {"x": X[0, 0, 0]}, tolerance=0)
    assert operators(model) == ["Relu", "Relu", "Neg"]


def test_nodes_with_subgraphs_stay():
    branch = "then_branch = p () => (float[A] q) { q = Neg(x) }, else_branch = r () => (float[A] s) { s = Relu(x) }"
    body = f"a = If (flag) <{branch}> b = If (flag) <{branch}> y = Mul(a, b)"
    model = parse(body, "float[A] x, bool flag", "float[A] y")
    check(model, {"x": X[0, 0, 0], "flag": np.array(True)}, tolerance=0)
    assert operators(model) == ["If", "If", "Mul"]


# remove_guards

GUARD = """m = Where(keep, zero, low) u = Unsqueeze(m, axis) t = Add(x, u) s = Softmax <axis = -1> (t) n = IsNaN(s)
    y = Where(n, zero, s)"""


def guarded(low: float, dtype: type = np.float32, body: str = GUARD) -> ir.Model:
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    constants = {"zero": dtype(0), "low": np.array(low, dtype), "axis": np.int64([1])}
    used = {name: array for name, array in constants.items() if name in body}
    return parse(body, f"{kind}[A,B,C,8] x, bool[A,C,8] keep", f"{kind}[A,B,C,8] y", **used)


KEEP = np.random.default_rng(1).random((2, 4, 8)) < 0.5
KEEP[0, 0] = False  # a row that sees nothing


def test_guard_behind_a_finite_mask_goes():
    body = "r = Relu(x) " + GUARD.replace("y = Where(n, zero, s)", "w = Where(n, zero, s) y = Neg(w)")
    model = guarded(np.finfo(np.float32).min, body=body.replace("Add(x, u)", "Add(u, r)"))
    decisions = check(model, {"x": X, "keep": KEEP}, tolerance=0)
    assert operators(model) == ["Relu", "Where", "Unsqueeze", "Add", "Softmax", "Neg"]
    assert reasons(decisions, "removed")[0] == "1 guards against NaN behind finite masks"


def test_nan_scores_stay_nan():
    """The one difference, on purpose."""
    body = GUARD.replace("y = Where(n, zero, s)", "w = Where(n, zero, s) y = Abs(w)")
    model = guarded(-1e30, body=body)
    x = X.copy()
    x[0, 0, 0, 0] = np.nan
    assert not np.isnan(run(model, {"x": x, "keep": KEEP})[0]).any()
    Prepare().call(Region.whole(model))
    assert np.isnan(run(model, {"x": x, "keep": KEEP})[0][0, 0, 0]).all()


TAIL = "w = Where(n, zero, s) y = Abs(w)"


@pytest.mark.parametrize(
    ("low", "dtype", "body", "reason"),
    [
        (-np.inf, np.float32, GUARD, "holds -inf in float32"),
        (-65504, np.float16, GUARD, "holds -65504 in float16"),
        (-1, np.float32, GUARD.replace("Unsqueeze(m, axis)", "Log(m)"), "not made by a Where of two constants"),
        (-1, np.float32, GUARD.replace("Add(x, u)", "Mul(x, u)"), "no mask is added"),
    ],
)
def test_guard_stays(low, dtype, body, reason):
    model = guarded(low, dtype, body.replace("y = Where(n, zero, s)", TAIL))
    if "Log" in body:
        model.graph.inputs[1].shape = ir.Shape(["A", 1, "C", 8])
    keep = KEEP[:, None] if "Log" in body else KEEP
    decisions = check(model, {"x": X.astype(dtype), "keep": keep}, tolerance=0)
    assert operators(model).count("Where") == 2
    assert reason in reasons(decisions, "kept")[0]


# remove_neutral


@pytest.mark.parametrize("step", ["And(true, a)", "And(a, true)", "Or(a, false)"])
def test_neutral_booleans_go(step):
    constants = {"true": np.array(True), "false": np.array([False])}
    used = {name: array for name, array in constants.items() if name in step}
    model = parse(f"a = Not(x) b = {step} y = Not(b)", "bool[A,3] x", "bool[A,3] y", **used)
    decisions = check(model, {"x": np.eye(3, dtype=bool)})
    assert operators(model) == ["Not", "Not"]
    assert reasons(decisions, "removed")[0] == "1 nodes with a constant that changes nothing"


def test_neutral_numbers_go():
    body = "a = Mul(one, x) b = Add(a, zero) c = Div(b, one) d = Sub(c, zero) y = Neg(d)"
    model = parse(body, "float[A,3] x", "float[A,3] y", one=np.float32(1), zero=np.float32([[0]]))
    check(model, {"x": np.eye(3, dtype=np.float32)}, tolerance=0)
    assert operators(model) == ["Neg"]


@pytest.mark.parametrize("step", ["Div(one, x)", "Sub(zero, x)", "Mul(x, zero)", "Mul(x, wide)", "Mul(x, high)"])
def test_constants_that_change_something_stay(step):
    constants = {"one": np.float32(1), "zero": np.float32(0), "wide": np.ones(3, np.float32)}
    constants["high"] = np.ones((1, 1, 1), np.float32)
    used = {name: array for name, array in constants.items() if name in step}
    model = parse(f"a = {step} y = Neg(a)", "float[2,3] x", "float y", **used)
    model.graph.outputs[0].shape = ir.Shape([None] * (3 if "high" in step else 2))
    decisions = check(model, {"x": np.full((2, 3), 2, np.float32)}, tolerance=0)
    assert len(operators(model)) == 2
    assert any("higher rank" in reason for reason in reasons(decisions, "kept")) == ("high" in step)


# sign_tables

ROTATE = """{0}h, {0}l = Split <axis = -1, num_outputs = 2> ({0}) {0}n = Neg({0}l)
    {0}j = Concat <axis = -1> ({0}n, {0}h) {0}m = Mul({0}j, s) {0}k = Mul({0}, c) r{0} = Add({0}k, {0}m) """


def rotary(*values: str, change: tuple[str, str] = ("", "")) -> ir.Model:
    body = "c = Cos(t) s = Sin(t) " + "".join(ROTATE.format(v) for v in values).replace(*change)
    total = "y = Add(ra, rb)" if len(values) == 2 else "y = Identity(ra)"
    return parse(body + total, "float[2,3,4,8] a, float[2,3,4,8] b, float[2,1,4,8] t", "float[2,3,4,8] y")


FEEDS = {"a": X, "b": X[::-1].copy(), "t": X[:, :1] * 7}


def test_signs_go_into_the_shared_table():
    model = rotary("a", "b")
    decisions = check(model, FEEDS, tolerance=0)
    assert "Neg" not in operators(model)
    assert operators(model).count("Mul") == 5
    assert reasons(decisions, "simplified") == ["the signs of 2 Neg went into the tables they meet"]


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ("a", ("", "")),
        ("ab", ("aj, s", "aj, c")),
        ("ab", ("am = Mul(aj, s)", "am = Add(aj, s)")),
        ("ab", ("ak = Mul(a, c)", "ak = Mul(aj, c)")),
    ],
)
def test_signs_stay_where_they_gain_nothing(values, change):
    model = rotary(*values, change=change)
    decisions = check(model, FEEDS, tolerance=0)
    assert operators(model).count("Neg") == len(values)
    assert not reasons(decisions, "simplified")


@pytest.mark.parametrize("unknown", ["aj", "s", "an", "ah"])
def test_signs_stay_where_a_shape_is_not_known(unknown):
    """Of what meets the table, of the table, of a part; the other product alone has nothing to gain."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(rotary("a", "b"))))
    for node in model.graph:
        for value in node.outputs:
            if value.name == unknown:
                value.shape = None
    step = Prepare()
    sign_tables(model, step.decide)
    assert not step.decisions
    assert operators(model).count("Neg") == 2


# group_heads

HEADS_OF = """ku{n} = Unsqueeze(k, two) ke{n} = Expand(ku{n}, five) kr{n} = Reshape(ke{n}, four)
    kt{n} = Transpose <perm = [0, 1, 3, 2]> (kr{n}) kc{n} = Mul(kt{n}, c) vu{n} = Unsqueeze(v, two)
    ve{n} = Expand(vu{n}, five) vr{n} = Reshape(ve{n}, four) qs{n} = Div({q}, d) s{n} = MatMul(qs{n}, kc{n})
    a{n} = Add(s{n}, mask) p{n} = Softmax <axis = 3> (a{n}) o{n} = MatMul(p{n}, vr{n}) """
GROUPED = HEADS_OF.format(q="q", n="") + "t = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(t, rows)"
HEADS = {
    "two": np.int64([2]),
    "five": np.int64([2, 3, 2, 5, 8]),
    "four": np.int64([2, 6, 5, 8]),
    "rows": np.int64([0, 0, -1]),
    "c": np.float32(0.25),
    "d": np.float32([3]),
}


def grouped(*changes: tuple[str, str], mask: str = "float[2,1,4,5] mask", outputs: str = "float[2,4,48] y") -> ir.Model:
    """Six query heads over three of keys and values, with the copies that exporters write."""
    body = GROUPED
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    inputs = f"float[2,6,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v, {mask}"
    return parse(body, inputs, outputs, **HEADS)


def heads_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {v.name: rng.standard_normal(v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}


GROUPED_REASON = "1 attentions read keys and values once for each group of heads"


@pytest.mark.parametrize("mask", ["float[2,1,4,5]", "float[1,4,5]", "float[4,5]", "float"])
def test_heads_are_not_copied(mask):
    model = grouped(mask=f"{mask} mask")
    decisions = check(model, heads_feeds(model))
    expected = ["Unsqueeze", "Transpose", "Mul", "Unsqueeze", "Reshape", "Div", "MatMul"]
    expected += ["Unsqueeze"] if "2,1" in mask else []
    expected += ["Add", "Softmax", "MatMul", "Transpose", "Reshape"]
    assert sorted(operators(model)) == sorted(expected)
    assert reasons(decisions, "simplified") == [GROUPED_REASON]
    product = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    assert product.shape == (2, 3, 2, 4, 5)


def test_heads_without_mask_and_a_result_that_others_read():
    changes = [("a = Add(s, mask)", "a = Mul(c, s)"), ("rows)", "rows) z = Relu(o) w = Neg(mask)")]
    model = grouped(*changes, outputs="float[2,4,48] y, float[2,6,4,8] z, float[2,1,4,5] w")
    decisions = check(model, heads_feeds(model))
    assert not [node for node in model.graph if node.op_type == "Expand"]
    assert operators(model).count("Reshape") == 3
    assert reasons(decisions, "simplified") == [GROUPED_REASON]


def test_two_layers_share_the_mask():
    body = HEADS_OF.format(q="q", n="") + "r = Abs(o) " + HEADS_OF.format(q="r", n="2") + "y = Neg(o2)"
    inputs = "float[2,6,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v, float[2,1,4,5] mask"
    model = parse(body, inputs, "float[2,6,4,8] y", **{name: a for name, a in HEADS.items() if name != "rows"})
    decisions = check(model, heads_feeds(model))
    assert operators(model).count("Unsqueeze") == 3  # keys, values and one for the mask
    assert reasons(decisions, "simplified") == [GROUPED_REASON.replace("1", "2")]


NO_KEYS = "no product with keys is found before the probabilities"


@pytest.mark.parametrize(
    ("change", "mask", "reason"),
    [
        (("p, vr", "p, vr"), "float[2,6,4,5] mask", NO_KEYS),
        (("Softmax <axis = 3>", "Softmax <axis = 2>"), "float[4,5] mask", NO_KEYS),
        (("a = Add(s, mask)", "r = Relu(s) a = Add(r, mask)"), "float[4,5] mask", NO_KEYS),
        (("y = Reshape(t, rows)", "w = Reshape(t, rows) x = ReduceSum <keepdims = 0> (p) y = Add(w, x)"),
         "float[4,5] mask", NO_KEYS),
        (("kc = Mul(kt, c)", "kc = Mul(kt, mask)"), "float mask", "the keys do not repeat heads as the values do"),
        (("kt = Transpose <perm = [0, 1, 3, 2]> (kr)", "n = Relu(kr) kt = Transpose <perm = [0, 1, 3, 2]> (n)"),
         "float[4,5] mask", "the keys do not repeat heads as the values do"),
    ],
)  # fmt: skip
def test_heads_stay_where_they_differ(change, mask, reason):
    model = grouped(change, mask=mask)
    decisions = check(model, heads_feeds(model))
    assert reasons(decisions, "kept") == [reason]
    assert "Expand" in operators(model)


def test_keys_that_are_not_repeated_by_sizes_stay():
    """Rows that the Expand repeats as well."""
    model = grouped()
    for value in model.graph.inputs:
        if value.name == "v":
            value.shape = ir.Shape((2, 3, 1, 8))
    feeds = heads_feeds(model)
    decisions = check(model, feeds)
    assert operators(model).count("Expand") == 2
    assert not reasons(decisions, "simplified")
