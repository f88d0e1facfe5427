"""awq: salient channels are scaled up where that lowers the output error, by constants, or by a Mul on request."""

import numpy as np
import onnx_ir as ir
import pytest
from opened import opened

from qcompile.models.tiny.build import Builder
from qcompile.passes.awq import Awq, awq_factor
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import relative_error, round_to_nearest, round_with_clip
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import weight_state
from qcompile.passes.statistics import Statistics

K, N = 64, 96
SPEC = QuantSpec(4, PerGroup(32))
POLICY = Policy(SPEC, lm_head=None, embedding=None)


def salient_model(*, foldable: bool = True) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """x → gamma (→ Gelu) → linear, and inputs (rows, K) of which some channels are much louder."""
    rng = np.random.default_rng(0)
    b = Builder(opset=21)
    v = b.Mul(b.input("x", ir.DataType.FLOAT, ["rows", K]), b.weight("gamma", np.ones(K, np.float32)))
    if not foldable:
        v = b.Gelu(v, name="act")
    model = b.model({"y": b.MatMul(v, rng.standard_normal((K, N)).astype(np.float32), name="fc")})
    loudness = np.exp(1.5 * rng.standard_normal(K))
    return model, {"x": (rng.standard_normal((400, K)) * loudness).astype(np.float32)}


def observed(model: ir.Model, feeds: dict[str, np.ndarray]) -> Region:
    region = Region.whole(model)
    for linear in find_linears(model.graph):
        proto = ir.to_proto(model)
        proto.graph.output.add().name = linear.activation.name
        rows = opened(proto.SerializeToString()).run([linear.activation.name], feeds)[0]
        region.statistics[linear.activation] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0))
    return region


def output(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return opened(model).run(None, feeds)[0]


def error(region: Region, rounding: object = round_to_nearest) -> float:
    (linear,) = find_linears(region.live_nodes())
    w, statistics = linear.read(), region.statistics[linear.activation]
    return relative_error(rounding(w, SPEC, statistics).dequantize() - w, w, statistics.gram)


@pytest.mark.parametrize("rounding", [round_to_nearest, round_with_clip])
def test_error_falls_where_channels_are_salient(rounding: object) -> None:
    model, feeds = salient_model()
    region = observed(model, feeds)
    before, reference, nodes = error(region, rounding), output(model, feeds), len(model.graph)
    awq = Awq(POLICY, rounding)
    awq.call(region)
    assert [decision.action for decision in awq.decisions] == ["folded"]
    assert error(region, rounding) < 0.85 * before
    # All columns were sampled, so the reported loss is the whole loss, but for the rounding of scales to float16.
    expected = (error(region, rounding) / before) ** 2
    assert awq.decisions[0].detail["relative_loss"] == pytest.approx(expected, rel=2e-2)
    assert len(model.graph) == nodes
    np.testing.assert_allclose(output(model, feeds), reference, atol=1e-5 * np.abs(reference).max())


def test_a_finer_grid_is_no_worse() -> None:
    losses = []
    for grid in (1, 4, 16):
        model, feeds = salient_model()
        awq = Awq(POLICY, round_to_nearest, grid=grid)
        awq.call(observed(model, feeds))
        losses.append(awq.decisions[0].detail["relative_loss"])
    assert losses[0] >= losses[1] >= losses[2]
    assert losses[2] < losses[0]


def test_even_channels_are_left_alone() -> None:
    model, feeds = salient_model()
    region = observed(model, feeds)
    for statistics in region.statistics.values():
        statistics.gram = np.eye(K, dtype=np.float32)
    (linear,) = find_linears(model.graph)
    linear.weight.const_value = ir.tensor(np.sign(linear.read()), name=linear.weight.name)
    awq = Awq(POLICY, round_to_nearest)
    awq.call(region)
    assert awq.decisions[0].action == "skipped"


def test_insert_mul_only_on_request() -> None:
    model, feeds = salient_model(foldable=False)
    region = observed(model, feeds)
    awq = Awq(POLICY, round_to_nearest)
    awq.call(region)
    assert awq.decisions[0].reason == "Gelu act is not homogeneous"

    before, reference = error(region), output(model, feeds)
    inserting = Awq(POLICY, round_to_nearest, insert_mul=True)
    inserting.call(region)
    assert inserting.decisions[0].action == "folded"
    assert inserting.decisions[0].detail["kind"] == "inserted"
    assert [node.op_type for node in model.graph] == ["Mul", "Gelu", "Mul", "MatMul"]
    assert error(region) < before
    np.testing.assert_allclose(output(model, feeds), reference, atol=1e-5 * np.abs(reference).max())

    again = Awq(POLICY, round_to_nearest, insert_mul=True)  # the inserted Mul is a producer now
    again.call(region)
    assert len(model.graph) == 4


@pytest.mark.parametrize("clip", [True, False])
def test_weights_say_whether_they_may_be_clipped(clip: bool) -> None:
    model, feeds = salient_model()
    Awq(POLICY, round_with_clip, clip=clip).call(observed(model, feeds))
    assert [weight_state(linear.weight).clip for linear in find_linears(model.graph)] == [clip]
    model, feeds = salient_model()
    Awq(Policy(SPEC, None, None, exclude=("fc",)), round_with_clip).call(observed(model, feeds))
    assert all(weight_state(linear.weight).clip is None for linear in find_linears(model.graph))


def test_factor_of_dead_channels_is_one() -> None:
    factor = awq_factor(np.array([0, 16, 1], np.float32), np.ones(3, np.float32), 0.5, 0.5)
    np.testing.assert_allclose(factor, [1, 2**0.5, 0.5**0.5], rtol=1e-6)


def test_factor_follows_both_exponents() -> None:
    energy, power = np.array([1, 4, 16], np.float32), np.array([1, 16, 81], np.float32)
    for beta, gamma in [(0.5, 0), (0.5, 0.5), (0, 0.5), (1, 1)]:
        wanted = np.sqrt(energy) ** beta / np.sqrt(power) ** gamma
        factor = awq_factor(energy, power, beta, gamma)
        np.testing.assert_allclose(factor, wanted / np.exp(np.log(wanted).mean()), rtol=1e-6)


def test_uneven_weights_are_evened_by_gamma() -> None:
    """Even inputs into rows of which some are much larger: scaling by weights alone lowers the error, and is folded."""
    model, feeds = salient_model()
    (linear,) = find_linears(model.graph)
    w = linear.read() * np.exp(1.5 * np.random.default_rng(3).standard_normal((K, 1))).astype(np.float32)
    linear.weight.const_value = ir.tensor(w, name=linear.weight.name)
    feeds["x"] = np.random.default_rng(4).standard_normal((400, K)).astype(np.float32)
    region = observed(model, feeds)
    before, reference = error(region), output(model, feeds)
    (energy,) = (own.energy for own in region.statistics.values())
    awq = Awq(POLICY, round_to_nearest)
    awq.call(region)
    (decision,) = awq.decisions
    assert decision.action == "folded"
    beta, gamma = (float(word.split("=")[1]) for word in decision.reason.split())
    assert gamma > 0
    assert error(region) < 0.9 * before
    divided = 1 / model.graph.initializers["gamma"].const_value.numpy()
    np.testing.assert_allclose(divided, awq_factor(energy, np.square(w).mean(axis=1), beta, gamma), rtol=1e-5)
    np.testing.assert_allclose(output(model, feeds), reference, atol=1e-5 * np.abs(reference).max())


def test_bad_grid() -> None:
    with pytest.raises(UserError, match="grid must be at least 1"):
        Awq(POLICY, round_to_nearest, grid=0)
