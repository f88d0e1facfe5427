"""passes/prepare/hard_swish.py: hard swishes and hard sigmoids in every spelling, and what only looks like one."""

import numpy as np
import onnx_ir as ir
import pytest
from preparing import check, operators, parse, reasons, run

from qcompile.passes.base import Region
from qcompile.passes.prepare import Prepare

X = {"x": np.concatenate([np.linspace(-8, 8, 321), [-3, 3, 0]]).astype(np.float32).reshape(2, 2, 81)}
IN, OUT = "float[A,B,D] x", "float[A,B,D] y"
NUMBERS = {
    "zero": 0.0, "one": 1.0, "three": 3.0, "six": 6.0, "half": 0.5, "fifth": 0.2, "sixth": 1 / 6, "two": 2.0, "m3": -3.0
}  # fmt: skip


def graph(body: str, *, dtype: type = np.float32, rank: int = 0, outputs: str = OUT, opset: int = 21) -> ir.Model:
    """The body, with each of NUMBERS that it names as a constant of that rank."""
    named = {name: np.full((1,) * rank, number, dtype) for name, number in NUMBERS.items() if name in body}
    text = {np.float32: "float", np.float16: "float16"}[dtype]
    return parse(body, IN.replace("float", text), outputs.replace("float", text), opset=opset, **named)


RELU6 = {
    "clip": "a = Add(x, three) r = Clip(a, zero, six) ",
    "sub": "a = Sub(x, m3) r = Clip(a, zero, six) ",
    "min of max": "a = Add(three, x) b = Max(a, zero) r = Min(b, six) ",
    "max of min": "a = Add(x, three) b = Min(six, a) r = Max(zero, b) ",
    "min of relu": "a = Add(x, three) b = Relu(a) r = Min(b, six) ",
    "clip of relu": "a = Add(x, three) b = Relu(a) r = Clip(b, , six) ",
}
PRODUCTS = {
    "div last": "p = Mul(x, r) y = Div(p, six)",
    "mul last": "p = Mul(r, x) y = Mul(sixth, p)",
    "gate divided": "p = Div(r, six) y = Mul(x, p)",
    "gate multiplied": "p = Mul(r, sixth) y = Mul(p, x)",
    "x divided": "p = Div(x, six) y = Mul(p, r)",
    "x multiplied": "p = Mul(x, sixth) y = Mul(p, r)",
}
UNIT = {
    "clip": "a = Div(x, six) b = Add(a, half) h = Clip(b, zero, one) ",
    "multiplied": "a = Mul(sixth, x) b = Add(half, a) h = Clip(b, zero, one) ",
    "shifted first": "a = Add(x, three) b = Div(a, six) h = Clip(b, zero, one) ",
    "min and max": "a = Div(x, six) b = Add(a, half) d = Max(b, zero) h = Min(d, one) ",
    "operator": "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) ",
    "operator of paddle": "h = HardSigmoid <alpha = 0.1666667, beta = 0.5> (x) ",
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("gate", RELU6.values(), ids=RELU6)
def test_hard_swish_of_relu6(gate, product):
    model = graph(gate + product)
    decisions = check(model, X)
    assert operators(model) == ["HardSwish"]
    assert reasons(decisions, "simplified") == ["1 HardSwish that were written out"]


@pytest.mark.parametrize("gate", UNIT.values(), ids=UNIT)
def test_hard_swish_of_hard_sigmoid(gate):
    model = graph(gate + "y = Mul(x, h)")
    check(model, X)
    assert operators(model) == ["HardSwish"]


@pytest.mark.parametrize("rank", [1, 3])
def test_constants_of_any_rank_that_widen_nothing(rank):
    model = graph("a = Add(x, three) b = Max(a, zero) r = Min(b, six) p = Mul(x, r) y = Div(p, six)", rank=rank)
    check(model, X)
    assert operators(model) == ["HardSwish"]


def test_source_that_is_a_line_itself():
    """As Paddle writes it: x = 2 z + 1/2 would be a gate of z too, but with another slope."""
    model = graph(
        "z = Mul(x, two) w = Add(z, half) " + RELU6["clip"].replace("(x", "(w") + "p = Mul(w, r) y = Div(p, six)"
    )
    check(model, X)
    assert operators(model) == ["Mul", "Add", "HardSwish"]


@pytest.mark.parametrize("version", [11, 13])
def test_old_opsets_are_raised_first(version):
    body = "three = Constant <value = float {3}> () six = Constant <value = float {6}> () "
    body += "zero = Constant <value = float {0}> () " + RELU6["clip"] + PRODUCTS["div last"]
    model = parse(body, IN, OUT, opset=version)
    check(model, X)
    assert operators(model) == ["HardSwish"]


def test_float16():
    """1/6 is 2e-4 off in float16; x of 20000 overflows when it is multiplied by six first."""
    model = graph(RELU6["clip"] + PRODUCTS["mul last"], dtype=np.float16)
    check(model, {"x": X["x"].astype(np.float16)}, tolerance=2e-3)
    assert operators(model) == ["HardSwish"]
    assert run(model, {"x": np.full((1, 1, 1), 20000, np.float16)})[0].item() == 20000


SIGMOIDS = {
    "divided": RELU6["clip"] + "y = Div(r, six)",
    "multiplied": RELU6["min of relu"] + "y = Mul(sixth, r)",
    **{name: text.replace("h = Clip", "y = Clip").replace("h = Min", "y = Min") for name, text in UNIT.items()},
    "of Keras": "a = Mul(x, fifth) b = Add(a, half) y = Clip(b, zero, one)",
}


@pytest.mark.parametrize("body", [body for body in SIGMOIDS.values() if "HardSigmoid" not in body])
def test_hard_sigmoid(body):
    model = graph(body)
    decisions = check(model, X)
    assert operators(model) == ["HardSigmoid"]
    assert reasons(decisions, "simplified") == ["1 HardSigmoid that were written out"]


def test_gate_of_another_value():
    """Squeeze and excitation: the product is none of the gate's own source."""
    model = graph(RELU6["clip"] + "h = Div(r, six) z = Neg(x) y = Mul(z, h)")
    check(model, X)
    assert operators(model) == ["HardSigmoid", "Neg", "Mul"]


def test_hard_swish_keeps_its_shift_from_the_convolution():
    """The + 3 behind a convolution is no bias of it."""
    body = (
        "c = Conv(x, w) d = Mul(c, two) " + RELU6["clip"].replace("(x", "(d") + PRODUCTS["div last"].replace("(x", "(d")
    )
    weight = np.random.default_rng(0).standard_normal((3, 2, 1)).astype(np.float32)
    named = {name: np.float32(NUMBERS[name]) for name in ("two", "three", "zero", "six")}
    model = parse(body, "float[A,2,D] x", "float[A,3,D] y", w=weight, **named)
    check(model, X)
    assert operators(model) == ["Conv", "HardSwish"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (RELU6["clip"] + "p = Mul(x, r) q = Div(p, six) y = Add(q, r)", "no HardSwish: r is used elsewhere too"),
        (RELU6["clip"] + "p = Mul(x, r) q = Div(p, six) y = Add(q, a)", "no HardSwish: a is used elsewhere too"),
        (RELU6["clip"] + "p = Mul(x, r) q = Div(p, six) y = Add(q, p)", "no HardSwish: it is scaled by 6"),
        (RELU6["clip"] + "y = Mul(x, r)", "no HardSwish: it is scaled by 6"),
        (RELU6["clip"] + "p = Mul(x, r) y = Div(p, three)", "no HardSwish: it is scaled by 6"),
        (RELU6["clip"] + "p = Mul(x, r) y = Div(six, p)", "no HardSwish: it is scaled by 6"),
        (RELU6["clip"] + "q = Div(r, six) y = Add(q, a)", "no HardSigmoid: a is used elsewhere too"),
        ("s = Sigmoid(x) y = Mul(x, s)", None),
        ("y = Clip(x, zero, six)", None),
        ("a = Add(x, half) y = Clip(a, zero, one)", None),
        ("a = Add(x, three) r = Clip(a, one, six) p = Mul(x, r) y = Div(p, six)", None),
        ("a = Add(x, three) r = Relu(a) p = Mul(x, r) y = Div(p, six)", None),
        ("a = Add(x, two) r = Clip(a, zero, six) p = Mul(x, r) y = Div(p, six)", None),
        ("h = HardSigmoid(x) y = Mul(x, h)", None),
        ("z = Neg(x) h = HardSigmoid <alpha = 0.1666667> (z) y = Mul(x, h)", None),
        ("a = Add(x, three) r = Clip(a, zero, x0) p = Mul(x, r) y = Div(p, six)", None),
    ],
)
def test_what_only_looks_like_one_stays(body, reason):
    """With a reason where all but one thing is right."""
    model = graph("i = Constant <value = int64 {0}> () x0 = ReduceMax <keepdims = 0> (x) " * ("x0" in body) + body)
    before = [op_type for op_type in operators(model) if op_type != "Constant"]
    feeds = X if "(six, p)" not in body else {"x": np.abs(X["x"]) + 1}
    decisions = check(model, feeds)
    assert operators(model) == before
    assert reasons(decisions, "kept") == ([reason] if reason else [])


def test_graph_outputs_stay():
    model = graph(RELU6["clip"] + PRODUCTS["div last"], outputs=f"{OUT}, float[A,B,D] r")
    decisions = check(model, X)
    assert operators(model) == ["Add", "Clip", "Mul", "Div"]
    assert reasons(decisions, "kept") == ["no HardSwish: r is used elsewhere too"]


def test_constants_that_may_widen_stay():
    """Of an x whose rank nobody knows, a constant (1, 1, 1) may make more of it."""
    body = "x = Reshape(z, shape) " + RELU6["clip"].replace("zero", "low").replace(", six", ", high")
    numbers = {"three": np.full((1, 1, 1), 3, np.float32), "low": np.float32(0), "high": np.float32(6)}
    numbers["flat"] = np.int64([-1])
    body += "p = Mul(x, r) q = Div(p, high) y = Reshape(q, flat)"
    model = parse(body, "float[N] z, int64[R] shape", "float[M] y", **numbers)
    check(model, {"z": X["x"].reshape(-1), "shape": np.int64([2, -1])})
    assert operators(model) == ["Reshape", "Add", "Clip", "Mul", "Div", "Reshape"]


def test_opsets_without_hard_swish_stay():
    step = Prepare(opset=13)
    model = graph(RELU6["clip"] + PRODUCTS["div last"], opset=13)
    step.call(Region.whole(model))
    assert operators(model) == ["Add", "Clip", "Mul", "Div"]
    assert "HardSwish needs opset 14" in reasons(step.decisions, "skipped")


def test_doubles_stay():
    named = {name: np.float64(number) for name, number in NUMBERS.items() if name in ("three", "zero", "six")}
    model = parse(RELU6["clip"] + PRODUCTS["div last"], "double[N] x", "double[N] y", **named)
    decisions = check(model, {"x": X["x"].reshape(-1).astype(np.float64)})
    assert operators(model) == ["Add", "Clip", "Mul", "Div"]
    assert reasons(decisions, "kept") == ["no HardSwish: ONNX Runtime computes none of type DOUBLE"]


@pytest.mark.parametrize("least", ["zero", "three"])
def test_a_clip_to_one_number_is_no_gate(least):
    model = graph(f"a = Add(x, three) r = Clip(a, {least}, {least}) p = Mul(x, r) y = Div(p, six)")
    check(model, X)
    assert "Clip" in operators(model)
