"""The pass `pack` on whole models: every weight is quantized, or has its reason."""

from collections import Counter

import onnx_ir as ir

from qcompile.models.tiny import tiny_branch, tiny_conv, tiny_decoder
from qcompile.passes.base import Decision, Region
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.spec import PerGroup, QuantSpec

SPEC, EIGHT = QuantSpec(4, PerGroup(32)), QuantSpec(8, PerGroup(32))
ALL = Policy(SPEC, SPEC, SPEC)


def _pack(model: ir.Model, policy: Policy = ALL) -> dict[str, Decision]:
    step = Pack(policy)
    step.call(Region.whole(model))
    step.call_rest(model)
    assert len({decision.node for decision in step.decisions}) == len(step.decisions), "one decision a node"
    return {decision.node: decision for decision in step.decisions}


def test_convolutions_are_counted_as_skipped() -> None:
    decisions = _pack(tiny_conv())
    skipped = {name for name, decision in decisions.items() if decision.reason == "no packed format for Conv weights"}
    assert skipped == {"conv_0", "conv_1"}
    assert {decisions[name].action for name in skipped} == {"skipped"}


def test_a_convolution_that_the_user_keeps_is_kept() -> None:
    decision = _pack(tiny_conv(), Policy(SPEC, SPEC, SPEC, exclude=("conv_0",)))["conv_0"]
    assert (decision.action, decision.reason) == ("kept", "excluded by 'conv_0'")


def test_weights_of_branches() -> None:
    """`outer.weight` serves the main graph and a branch: its codes are there once."""
    model = tiny_branch()
    Prepare().call(Region.whole(model))
    decisions = _pack(model)
    assert {name: decision.action for name, decision in decisions.items()} == {
        "outer": "quantized",
        "then": "quantized",
        "else": "quantized",
    }
    assert decisions["else"].reason == "int4 g32 asym: in a body, rounded without data"
    assert decisions["else"].detail["weight"] == decisions["outer"].detail["weight"] == "outer.weight"
    assert "outer.weight" not in model.graph.initializers


def test_a_kept_head_of_a_decoder() -> None:
    model = tiny_decoder(layers=1)
    decisions = _pack(model, Policy(SPEC, None, EIGHT))
    assert (decisions["lm_head"].action, decisions["lm_head"].reason) == ("kept", "lm_head is kept in float")
    assert Counter(decision.action for decision in decisions.values()) == {"quantized": 7 + 1, "kept": 1}
    assert sum(node.op_type == "MatMulInt4" for node in model.graph) == 7
