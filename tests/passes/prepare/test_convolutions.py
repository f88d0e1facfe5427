"""passes/prepare/convolutions.py: what is linear by channel goes into the convolution before it; the rest says why."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from preparing import check, operators, parse, prepare, reasons

from qcompile.passes.base import Region
from qcompile.passes.prepare import Prepare
from qcompile.passes.tensors import read

RNG = np.random.default_rng(0)
C = 6  # output channels
X = {"x": RNG.standard_normal((2, 4, 7, 5)).astype(np.float32)}
IN, OUT = "float[N,4,H,W] x", "float[N,6,P,Q] y"


def normal(*shape: int, dtype=np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def norm(channels: int = C, dtype=np.float32) -> dict[str, np.ndarray]:
    """Parameters of a BatchNormalization."""
    variance = RNG.uniform(0.1, 3, channels).astype(dtype)
    return dict(zip("gbmv", (*(normal(channels, dtype=dtype) for _ in range(3)), variance), strict=True))


NORM = "y = BatchNormalization <epsilon = 0.01> (c, g, b, m, v)"
PADDED = "c = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> "

# Operators behind c = Conv(x, w): constants k of one a channel, s of one value.
BEHIND = {
    "normalization": NORM,
    "mul": "y = Mul(c, k)",
    "mul from the left": "y = Mul(k, c)",
    "mul by a scalar": "y = Mul(s, c)",
    "add": "y = Add(c, k)",
    "add from the left": "y = Add(k, c)",
    "add one value": "y = Add(c, s)",
    "sub": "y = Sub(c, k)",
    "sub from": "y = Sub(k, c)",
    "div": "y = Div(c, k)",
    "chain": "d = Mul(c, s) e = Add(k, d) f = Div(e, s) h = Sub(k, f) i = Sub(h, s) " + NORM.replace("(c,", "(i,"),
}


@pytest.mark.parametrize("bias", ["given", "", "left out by name"])
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_linear_steps_go_into_the_weights(behind, bias):
    weights = norm() | {"w": normal(C, 4, 3, 3), "k": normal(C, 1, 1) + 2, "s": np.float32(0.7), "a": normal(C)}
    model = parse(PADDED + ("(x, w, a) " if bias == "given" else "(x, w) ") + behind, IN, OUT, **weights)
    model.graph[0].resize_inputs(3 if bias else 2)
    steps = len(list(model.graph)) - 1
    decisions = check(model, X)
    assert operators(model) == ["Conv"]
    (reason,) = reasons(decisions, "folded")
    assert reason.startswith(f"{steps} nodes into the weights of 1 convolutions before them: ")
    offset = bias == "given" or behind not in ("y = Mul(c, k)", "y = Mul(k, c)", "y = Mul(s, c)", "y = Div(c, k)")
    assert len(model.graph[0].inputs) == (3 if offset else 2)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (C, 1, 1), (1, C, 1, 1), (1, 1, 1, 1)])
def test_shapes_of_constants(shape):
    model = parse("c = Conv(x, w) d = Mul(c, k) y = Add(d, k)", IN, OUT, w=normal(C, 4, 3, 3), k=normal(*shape))
    check(model, X)
    assert operators(model) == ["Conv"]


@pytest.mark.parametrize(
    ("attributes", "weight", "size"),
    [
        ("Conv <group = 2>", (C, 2, 3, 3), (7, 5)),
        ("Conv <group = 4>", (8, 1, 3, 3), (7, 5)),
        ("Conv", (C, 4, 3), (9,)),
        ("Conv <dilations = [1, 2, 1]>", (C, 4, 3, 2, 1), (5, 6, 4)),
        ("ConvTranspose <strides = [2, 2], output_padding = [1, 1]>", (4, C, 2, 3), (7, 5)),
        ("ConvTranspose <group = 2, pads = [1, 0, 0, 1]>", (4, 3, 3, 3), (7, 5)),
        ("ConvTranspose <group = 4>", (4, 1, 3), (9,)),
    ],
)
def test_groups_ranks_and_transposed_convolutions(attributes, weight, size):
    kind, group = attributes.split()[0], 4 if "4" in attributes else 2 if "group" in attributes else 1
    channels = weight[0] if kind == "Conv" else weight[1] * group
    axes = ",".join(f"D{i}" for i in range(len(size)))
    outputs = f"float[N,{channels},{axes.replace('D', 'E')}] y"
    body = f"c = {attributes} (x, w) d = Add(c, k) " + NORM.replace("(c,", "(d,")
    constant = normal(1, channels, *(1 for _ in size))
    model = parse(body, f"float[N,4,{axes}] x", outputs, w=normal(*weight), k=constant, **norm(channels))
    check(model, {"x": normal(2, 4, *size)})
    assert operators(model) == [kind]


def test_opset_7_of_a_network_with_residuals():
    """Two blocks, in which only what nobody else reads goes; the names of activations that stay are those behind it."""
    body = """c = Conv(x, w) n = BatchNormalization(c, g, b, m, v) r = Relu(n) d = Conv(r, u) o = Add(d, k)
        z = Add(o, r) y = Mul(z, s)"""
    weights = {"w": normal(C, 4, 1, 1), "u": normal(C, C, 1, 1), "k": normal(C, 1, 1), "s": normal(1)}
    model = parse(body, IN, OUT, opset=7, **weights, **norm())
    decisions = check(model, X)
    assert operators(model) == ["Conv", "Relu", "Conv", "Add", "Mul"]
    assert [node.outputs[0].name for node in model.graph] == ["n", "r", "o", "z", "y"]
    assert "2 nodes into the weights of 2 convolutions before them: 1 Add, 1 BatchNormalization" in reasons(
        decisions, "folded"
    )


def test_shared_constants_are_copied():
    """Two convolutions share weight, bias and factor; a third value reads all of them and sees no change."""
    body = """c = Conv(x, w, a) d = Mul(c, k) e = Conv(x, w, a) f = Sub(e, k) p = Add(d, f)
        u = Erf(w) q = ReduceSum <keepdims = 0> (u) r = Add(p, q)
            v = Erf(a) t = ReduceSum <keepdims = 0> (v) h = Mul(r, t) y = Mul(h, k)"""
    model = parse(body, IN, OUT, w=normal(C, 4, 3, 3), a=normal(C), k=normal(C, 1, 1))
    check(model, X)
    assert operators(model).count("Conv") == 2
    assert operators(model).count("Mul") == 2
    assert {"w", "a", "k", "w_folded"} <= set(model.graph.initializers)


def test_offset_alone_keeps_the_weight():
    model = parse("c = Conv(x, w) y = Add(c, k)", IN, OUT, w=normal(C, 4, 3, 3), k=normal(C, 1, 1))
    weight = model.graph.initializers["w"]
    check(model, X)
    assert model.graph[0].inputs[1] is weight


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Conv(x, w) d = Mul(c, s) r = Relu(c) y = Add(d, r)", "c is read elsewhere too"),
        ("c = Conv(x, w) y = Div(s, c)", "it divides by the value"),
        ("c = Conv(x, w) y = Mul(c, places)", "its constant is not of one value, or of one a channel"),
        ("c = Conv(x, w) y = Mul(c, five)", "its constant is not of one value, or of one a channel"),
        ("c = Conv(x, w) y = Mul(c, images)", "its constant is not of one value, or of one a channel"),
        (
            "c = Conv(x, w) d = Mul(c, deep) y = Squeeze(d, zero)",
            "its constant is not of one value, or of one a channel",
        ),
        ("t = Mul(w, h) c = Conv(x, t) y = Mul(c, s)", "its weight or bias is no constant"),
        ("c = Conv(x, w, i) y = Mul(c, s)", "its weight or bias is no constant"),
        ("c = Conv(x, w) " + NORM.replace("m,", "i,"), "its parameters are no constants"),
    ],
)
def test_what_is_not_linear_by_channel_stays(body, reason):
    weights = {"w": normal(C, 4, 3, 3), "s": np.float32(2.5), "five": normal(3), "places": normal(5, 3)}
    weights |= {"images": normal(2, 1, 1, 1), "deep": normal(1, 1, 1, 1, 1), "zero": np.int64([0])} | norm()
    model = parse(body, f"{IN}, float h, float[6] i", OUT, **weights)
    before = operators(model)
    decisions = check(model, X | {"h": np.array(0.5, np.float32), "i": normal(C)})
    assert [found.partition(": ")[2] for found in reasons(decisions, "kept")] == [reason]
    assert operators(model) == before


def test_chain_ends_where_others_read():
    model = parse(
        "c = Conv(x, w) d = Mul(c, s) e = Add(d, s) y = Mul(e, d)", IN, OUT, w=normal(C, 4, 3, 3), s=normal(1)
    )
    decisions = check(model, X)
    assert operators(model) == ["Conv", "Add", "Mul"]
    assert reasons(decisions, "kept") == ["not folded into Conv_0: d is read elsewhere too"]


def test_constants_that_the_caller_gives_stay_silently():
    model = parse("c = Conv(x, w) y = Mul(c, k)", f"{IN}, float[6,1,1] k", OUT, w=normal(C, 4, 3, 3))
    decisions = check(model, X | {"k": normal(C, 1, 1)})
    assert operators(model) == ["Conv", "Mul"]
    assert not reasons(decisions, "kept")


def test_graph_outputs_stay():
    model = parse("c = Conv(x, w) y = Mul(c, s)", IN, f"{OUT}, float[N,6,P,Q] c", w=normal(C, 4, 3, 3), s=normal(1))
    decisions = check(model, X)
    assert operators(model) == ["Conv", "Mul"]
    assert reasons(decisions, "kept") == ["not folded into Conv_0: c is a graph output"]


def test_reader_in_a_subgraph_stays():
    body = """c = Conv(x, w) d = Mul(c, s)
        y = If (on) <then_branch = t () => (float[N,6,P,Q] p) { p = Add(c, d) },
                     else_branch = e () => (float[N,6,P,Q] q) { q = Add(d, s) }>"""
    model = parse(body, f"{IN}, bool on", OUT, w=normal(C, 4, 3, 3), s=normal(1))
    decisions = check(model, X | {"on": np.array(True)})
    assert operators(model) == ["Conv", "Mul", "If"]
    assert reasons(decisions, "kept") == ["not folded into Conv_0: c is read elsewhere too"]


def test_a_weight_without_elements_stays():
    model = parse("c = Conv(x, w) y = Mul(c, s)", IN, "float[N,0,P,Q] y", w=normal(0, 4, 3, 3), s=normal(1))
    assert reasons(prepare(model), "kept") == ["not folded into Conv_0: its weight has no elements"]


def test_a_normalization_of_other_channels_stays():
    """ONNX Runtime refuses it when it runs."""
    damaged = norm() | {"v": np.ones((2, 0, 2), np.float32)}
    model = parse("c = Conv(x, w) " + NORM, IN, OUT, w=normal(C, 4, 3, 3), **damaged)
    own = Prepare()
    own.call(Region.whole(model))
    assert reasons(own.decisions, "kept") == ["not folded into Conv_0: its parameters are not one a channel"]


def test_a_bias_of_another_shape_stays():
    """As before: ONNX Runtime refuses it when it runs."""
    weights = {"w": normal(C, 4, 3, 3), "b": np.ones((2, 0, 3), np.float32), "s": normal(1)}
    model = parse("c = Conv(x, w, b) y = Mul(c, s)", IN, OUT, **weights)
    own = Prepare()
    own.call(Region.whole(model))
    assert reasons(own.decisions, "kept") == ["not folded into Conv_0: its bias is not one number a channel"]


def test_training_stays():
    body = "c = Conv(x, w) y, p, q = BatchNormalization <training_mode = 1> (c, g, b, m, v)"
    model = parse(body, IN, OUT, w=normal(C, 4, 3, 3), **norm())
    decisions = prepare(model)
    assert reasons(decisions, "kept") == ["not folded into Conv_0: it is in training mode"]


@pytest.mark.parametrize(
    ("weight", "factors", "left", "reason"),
    [
        (1.0, [6e4, 5e-5], 0, ""),  # the first alone would be too much for the second convolution
        (30.0, [2.0, 6e4], 1, "the result is not finite in FLOAT16"),
        (1.0, [2.0, 1e-5], 1, "the weight would be too small for FLOAT16"),
        (1e-7, [0.5, 3.0], 0, ""),  # small before, and no smaller in the end
    ],
)
def test_float16_keeps_to_its_range(weight, factors, left, reason):
    """As many factors as fit go; a channel of zeros has nothing to lose."""
    w = np.full((C, 4, 1, 1), weight, np.float16)
    w[1] = 0
    numbers = {f"k{i}": np.float16(factor) for i, factor in enumerate(factors)}
    inputs, outputs = IN.replace("float", "float16"), OUT.replace("float", "float16")
    model = parse("c = Conv(x, w) d = Mul(c, k0) y = Mul(d, k1)", inputs, outputs, w=w, **numbers)
    x = RNG.uniform(1e-4, 1e-3, (2, 4, 7, 5)).astype(np.float16)
    decisions = check(model, {"x": x}, tolerance=4e-3)  # a few roundings of 2^-11, and of small numbers
    assert operators(model) == ["Conv"] + ["Mul"] * left
    assert [found.partition(": ")[2] for found in reasons(decisions, "kept")] == [reason] * left


@pytest.mark.parametrize(("dtype", "factor"), [(np.float16, 2), (np.float32, 1e34)])
def test_bias_beyond_the_type_stays(dtype, factor):
    """The sum with the bias fits, the bias alone does not."""
    w, a = np.full((C, 4, 1, 1), -7500, dtype), np.full(C, 6e4, dtype)
    text = "float16" if dtype == np.float16 else "float"
    model = parse(
        "c = Conv(x, w, a) y = Mul(c, k)",
        IN.replace("float", text),
        OUT.replace("float", text),
        w=w,
        a=a,
        k=dtype(factor),
    )
    decisions = check(model, {"x": np.full((1, 4, 2, 2), 1.9, dtype)}, tolerance=1e-3)
    assert operators(model) == ["Conv", "Mul"]
    assert f"the result is not finite in {'FLOAT16' if text == 'float16' else 'FLOAT'}" in reasons(decisions, "kept")[0]


def test_negative_variance_stays():
    """It gives NaN; a fold would spread it, or hide it."""
    model = parse("c = Conv(x, w) " + NORM, IN, OUT, w=normal(C, 4, 3, 3), **norm() | {"v": np.full(C, -1, np.float32)})
    assert reasons(prepare(model), "kept") == ["not folded into Conv_0: the result is not finite in FLOAT"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64])
def test_types_that_onnx_runtime_does_not_run(dtype):
    """Rounded once from float64: the weight of the result is what numpy says."""
    name = "bfloat16" if dtype != np.float64 else "double"
    w, k = normal(C, 4, 3, 3).astype(dtype), normal(C, 1, 1).astype(dtype)
    inputs, outputs = IN.replace("float", name), OUT.replace("float", name)
    model = parse("c = Conv(x, w) d = Mul(c, k) y = Mul(d, k)", inputs, outputs, opset=22, w=w, k=k)
    Prepare().call(Region.whole(model))
    expected = (w.astype(np.float64) * k.astype(np.float64)[..., None] ** 2).astype(dtype)
    assert operators(model) == ["Conv"]
    np.testing.assert_array_equal(read(model.graph[0].inputs[1].const_value).astype(float), expected.astype(float))


def test_weights_on_disk_are_read_when_they_are_needed(tmp_path):
    w = normal(64, 4, 3, 3)
    model = parse("c = Conv(x, w) y = Mul(c, k)", IN, "float[N,64,P,Q] y", w=w, k=np.float32(2))
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=1024)
    model = ir.load(tmp_path / "model.onnx")
    prepare(model)
    folded = model.graph[0].inputs[1].const_value
    assert isinstance(folded, ir.LazyTensor)
    np.testing.assert_array_equal(read(folded), 2 * w)
