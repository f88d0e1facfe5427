"""Gated units become SwiGLU: operators in, operators out; the same numbers; what stays apart, and why."""

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.formats.lower import lower
from qcompile.passes.fuse import Fuse
from qcompile.passes.gates import fuse_gates
from qcompile.passes.graph import Names
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.runtime.sessions import session

N = 5
HALVES = "a, b = Split<axis=-1>(x, halves)"
SILU = "s = Sigmoid(a) g = Mul(a, s)"


def _parsed(body: str, *, kind: str = "float", opset: int = 21) -> ir.Model:
    """x (2, 4, 10) through `body`, which makes y; `halves` are [5, 5], `rows` [2, 2]."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g ({kind}[2,4,{2 * N}] x) => ({kind}[d,e,f] y)
        <int64[2] halves = {{{N}, {N}}}, int64[2] rows = {{2, 2}}> {{ {body} }}"""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(proto)


def _fused(model: ir.Model) -> list[tuple[str, str, str]]:
    decided: list[tuple[str, str, str]] = []

    def decide(node: str, action: str, reason: str, **detail: Any) -> None:
        decided.append((node, action, reason))

    fuse_gates(model, Names(model), decide)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return decided


def _run(model: ir.Model, kernels: str) -> np.ndarray:
    kind = np.float16 if model.graph.inputs[0].dtype == ir.DataType.FLOAT16 else np.float32
    x = np.random.default_rng(0).standard_normal((2, 4, 2 * N)).astype(kind)
    return np.asarray(
        session(ir.to_proto(model).SerializeToString(), kernels=kernels, threads=1).run(None, {"x": x})[0]
    )


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("product", ["y = Mul(g, b)", "y = Mul(b, g)"])
@pytest.mark.parametrize("silu", [SILU, "s = Sigmoid(a) g = Mul(s, a)"])
@pytest.mark.parametrize("split", [HALVES, "a, b = Split<axis=2>(x, halves)", "a, b = Split<axis=2, num_outputs=2>(x)"])
def test_halves_of_one_value_become_one_operator(kind: str, product: str, silu: str, split: str) -> None:
    model = _parsed(f"{split} {silu} {product}", kind=kind)
    before = _run(model, "portable")
    assert _fused(model) == [("y", "fused", "SwiGLU")]
    assert [(node.op_type, node.domain) for node in model.graph] == [("SwiGLU", "qcompile")]
    assert "halves" not in model.graph.initializers or "num_outputs" in split
    np.testing.assert_array_equal(_run(model, "portable"), before)
    np.testing.assert_allclose(_run(model, "auto"), before, rtol=2e-3 if kind == "float16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("b, a = Split<axis=-1>(x, halves) s = Sigmoid(a) g = Mul(a, s) y = Mul(g, b)", "not the halves of one value"),
        ("a, b = Split<axis=1>(x, rows) s = Sigmoid(a) g = Mul(a, s) y = Mul(g, b)", "not the halves of one value"),
        ("c, b = Split<axis=-1>(x, halves) a = Neg(c) s = Sigmoid(a) g = Mul(a, s) y = Mul(g, b)",
         "not the halves of one value"),
        (f"{HALVES} {SILU} n = Neg(b) y = Mul(g, n)", "not the halves of one value"),
        (f"{HALVES} {SILU} m = Mul(g, b) y = Add(m, g)", "something else reads a part of it"),
        (f"{HALVES} {SILU} m = Mul(g, b) y = Add(m, b)", "something else reads a part of it"),
        (f"{HALVES} {SILU} m = Mul(g, b) y = Add(m, s)", "something else reads a part of it"),
    ],
)  # fmt: skip
def test_what_is_kept_has_its_reason(body: str, reason: str) -> None:
    model = _parsed(body)
    before = [node.op_type for node in model.graph]
    ((_, action, told),) = _fused(model)
    assert (action, reason in told) == ("kept", True)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(("split", "action"), [("<axis=-1>(x, halves)", "fused"), ("<axis=-2>(x, rows)", "kept")])
def test_the_last_axis_is_known_without_a_rank(split: str, action: str) -> None:
    model = _parsed(f"a, b = Split{split} {SILU} y = Mul(g, b)")
    for value in model.graph[0].outputs:
        value.shape = None
    assert [own[1] for own in _fused(model)] == [action]


@pytest.mark.parametrize("kind", ["double", "bfloat16"])
def test_other_types_stay_as_they_are(kind: str) -> None:
    model = _parsed(f"{HALVES} {SILU} y = Mul(g, b)", kind=kind)
    assert _fused(model) == [("y", "kept", f"SwiGLU computes in float and float16, not {kind.upper()}")]


def test_a_sigmoid_of_something_else_gates_nothing() -> None:
    model = _parsed(f"{HALVES} s = Sigmoid(b) g = Mul(a, s) y = Mul(g, b)")
    assert _fused(model) == []


@pytest.mark.parametrize("target", ["qcompile", "matmulnbits", "qdq"])
def test_a_decoder_s_gates_are_fused_wherever_it_goes(target: str) -> None:
    """Whichever of gate and up comes first in the graph."""
    model = tiny_decoder()
    Prepare().call(Region.whole(model))
    Pack(Policy(QuantSpec(4, PerGroup(32)), None, None), target=target).call(Region.whole(model))
    step = Fuse()
    step.call(Region.whole(model))
    fused = [decision.node for decision in step.decisions if decision.reason == "SwiGLU"]
    made = [node.name for node in model.graph if node.op_type == "SwiGLU"]
    assert made == fused
    assert len(made) > 0
    lower(model, target)
    left = {(node.op_type, node.domain) for node in model.graph}
    assert (("SwiGLU", "qcompile") in left) == (target == "qcompile")
    assert (("Sigmoid", "") in left) == (target != "qcompile")
