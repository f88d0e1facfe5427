"""Routers: found by what their output chooses, and given 8 bits."""

import numpy as np
import pytest
from preparing import parse

from qcompile.passes.base import Region
from qcompile.passes.linears import find_linears
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.routers import router
from qcompile.passes.spec import PerGroup, QuantSpec

FOUR = QuantSpec(4, PerGroup(32))

ROUTERS = {
    "softmax, top 2": ("s = Softmax(a) v, i = TopK(s, two) y = Identity(i)", "it chooses by TopK"),
    "top 2 of biased sigmoids, in groups": (
        "g = Sigmoid(a) b = Add(g, c) r = Reshape(b, grouped) m, k = TopK(r, two) n = Neg(m) "
        "z = Where(mask, b, n0) v, i = TopK(z, two) y = Identity(i)",
        "it chooses by TopK",
    ),
    "one expert": ("i = ArgMax(a) y = Identity(i)", "it chooses by ArgMax"),
    "scaled": ("b = Mul(a, c) d = Cast <to = 10> (b) v, i = TopK(d, two) y = Identity(i)", "it chooses by TopK"),
    "a part of the scores": ("s = Slice(a, n0i, two, , one) v, i = TopK(s, two) y = Identity(i)", "it chooses by TopK"),
    "dense": ("s = Softmax(a) t = Transpose(s) u = Unsqueeze(t, two) y = Mul(u, x)", "its softmax weighs experts"),
    "MoE": ("y = com.microsoft.MoE(x, a, e, , e)", "a router of MoE"),
}
OTHERS = {
    "a classifier": "s = Softmax(a) y = Identity(s)",
    "an answer": "y = ArgMax(a)",
    "a gate": "s = Sigmoid(a) y = Mul(a, s)",
    "a part, by computed places": "n = Shape(x) s = Gather(a, n) v, i = TopK(s, two) y = Identity(i)",
    "hidden": "r = Relu(a) b = MatMul(r, w2) v, i = TopK(b, two) y = Identity(v)",
}


def _weight(k: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)


def _linear(body: str):
    text = "a = MatMul(x, w) " + body
    square = _weight(8, 8)
    constants = {"w": _weight(96, 8), "w2": square, "c": np.ones(8, "f"), "two": np.array([2]), "e": square}
    constants |= {"n0i": np.array([0]), "one": np.array([1])}
    constants |= {"grouped": np.array([-1, 4, 2]), "mask": np.ones(8, bool), "n0": np.zeros(8, "f")}
    model = parse(text, inputs="float[M,96] x", outputs="float[M,8] y", **constants)
    return model, find_linears(model.graph)[0]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_found(name) -> None:
    body, reason = ROUTERS[name]
    assert router(_linear(body)[1], None).endswith(reason)
    assert not router(_linear(body)[1], 8), "as wide as the vocabulary"


@pytest.mark.parametrize("name", OTHERS)
def test_other_linears_are_none(name) -> None:
    assert not router(_linear(OTHERS[name])[1], None)


@pytest.mark.parametrize(
    ("include", "bits"), [(["*"], "int8"), (["r*"], "int8"), (["*", "route"], "int4"), (["w"], "int4")]
)
def test_only_a_name_gives_a_router_four_bits(include, bits) -> None:
    model, linear = _linear("v, i = TopK(a, two) y = Identity(i)")
    linear.node.name = "route"
    step = Pack(Policy(FOUR, None, None, include))
    step.call(Region.whole(model))
    (decision,) = step.decisions
    assert decision.reason.startswith(bits)


def test_eight_bits_are_what_others_have() -> None:
    policy = Policy(QuantSpec(8, PerGroup(32)), None, None)
    assert policy.for_linear(_linear("v, i = TopK(a, two) y = Identity(i)")[1], None) == policy.body
