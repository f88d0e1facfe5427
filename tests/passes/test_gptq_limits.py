"""Error-compensated rounding where the statistics are poor: outliers, dead channels, few rows, none; and the pass."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.passes import gptq
from qcompile.passes.affine import Quantized
from qcompile.passes.base import Region
from qcompile.passes.gptq import Beside, ErrorCompensated, Gptq
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import fitted, round_to_nearest, round_with_clip
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import weight_state
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import limited

K, N = 64, 16
SPECS = {"sym": QuantSpec(4, PerGroup(24), symmetric=True), "asym": QuantSpec(4, PerGroup(24))}


def _x(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, K)) @ (np.eye(K) + 0.4 * rng.standard_normal((K, K)))).astype(np.float32)


def _statistics(x: np.ndarray) -> Statistics:
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))


def _loss(q: Quantized, w: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (q.dequantize().astype(np.float64) - w)).sum())


W = np.random.default_rng(9).standard_normal((K, N)).astype(np.float32)


@pytest.mark.parametrize("name", SPECS)
def test_an_outlier_channel_does_not_spoil_the_others(name) -> None:
    """A channel a thousand times the others, and orthogonal to them, leaves their compensation alone.

    Damping by a fraction of the mean energy, as GPTQ is usually written, would drown them: that is tried too.
    """
    x = _x(500)
    others = x.copy()
    others[:, 5] = 0
    loud = x[:, 5] - others @ np.linalg.lstsq(others, x[:, 5], rcond=None)[0]
    x[:, 5] = 1000 * loud
    statistics, clipped = _statistics(x), round_with_clip(W, SPECS[name], _statistics(x))
    found = ErrorCompensated()(W, SPECS[name], statistics)
    assert _loss(found, W, x) < _loss(clipped, W, x)
    assert _loss(found, W, others) < 0.6 * _loss(clipped, W, others)
    drowned = replace(statistics, gram=statistics.gram + 0.01 * statistics.gram.trace() / K * np.eye(K, dtype="f4"))
    assert _loss(ErrorCompensated()(W, SPECS[name], drowned), W, others) > 1.1 * _loss(found, W, others)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [0, 1, 10])
def test_fewer_rows_than_channels(rows, name) -> None:
    x = _x(rows)
    found = ErrorCompensated(damping=0.01)(
        W, SPECS[name], _statistics(x) if rows else Statistics(0, np.zeros((K, K), "f4"), W[:, 0])
    )
    assert np.isfinite(found.dequantize()).all()
    limit = np.abs(W).max()
    assert np.abs(found.dequantize() - W).max() < limit, "what no row sees stays near the weight"
    if rows:
        assert _loss(found, W, x) < 0.5 * _loss(round_to_nearest(W, SPECS[name], None), W, x)


@pytest.mark.parametrize("name", SPECS)
def test_dead_channels_stay_near_their_weights(name) -> None:
    x = _x(300)
    x[:, ::4] = 0
    found = ErrorCompensated()(W, SPECS[name], _statistics(x))
    assert np.isfinite(found.dequantize()).all()
    nearest = round_to_nearest(W, SPECS[name], None)
    moved, least = (np.abs(q.dequantize() - W)[::4].mean() for q in (found, nearest))
    assert moved < 2 * least
    assert _loss(found, W, x) < 0.7 * _loss(round_with_clip(W, SPECS[name], _statistics(x)), W, x)


@pytest.mark.parametrize("name", SPECS)
def test_zero_and_constant_weights(name) -> None:
    w = np.zeros((K, 3), np.float32)
    w[:, 1] = 0.5
    w[:24, 2] = -3.0
    found = ErrorCompensated()(w, SPECS[name], _statistics(_x(200)))
    np.testing.assert_allclose(found.dequantize(), w, rtol=2**-11, atol=0)  # scales are float16 numbers


@pytest.mark.parametrize("power", [-12, 12])
def test_units_of_the_activation_do_not_matter(power) -> None:
    x, scale = _x(200), np.float32(2.0**power)
    a, b = (ErrorCompensated()(W, SPECS["asym"], _statistics(data)) for data in (x, x * scale))
    assert _loss(b, W, x) == pytest.approx(_loss(a, W, x), rel=0.02)


def _region() -> tuple[Region, list]:
    model = tiny_decoder(layers=1, ffn=96)
    region, linears = Region.whole(model), find_linears(model.graph)
    for i, linear in enumerate(linears[:-1]):
        x = np.random.default_rng(i).standard_normal((100, linear.shape[0])).astype(np.float32)
        region.statistics.setdefault(linear.activation, _statistics(x))
    return region, linears


def test_the_pass_leaves_codes_for_pack_and_reasons_for_the_rest() -> None:
    region, linears = _region()
    before = [node.op_type for node in region.model.graph]
    body = QuantSpec(4, PerGroup(32))
    step = Gptq(Policy(body, lm_head=body, embedding=None, exclude=("*v_proj*",)))
    step.call(region)
    assert [node.op_type for node in region.model.graph] == before
    decisions = {decision.node: decision for decision in step.decisions}
    for linear in linears:
        if linear.name.endswith("v_proj"):
            assert not weight_state(linear.weight).codes
            found = decisions[linear.name]
            assert (found.action, found.reason) == ("skipped", "excluded by '*v_proj*'")
        elif linear.name == "lm_head":
            assert (decisions["lm_head"].action, decisions["lm_head"].reason) == (
                "skipped",
                "its input was not observed",
            )
        else:
            assert decisions[linear.name].action == "rounded"
            _check_rounded(region, linear, decisions[linear.name].detail["relative_error"], body)


def test_every_linear_has_one_decision() -> None:
    """Of a region and of the next one, whose nodes read weights that have codes already."""
    region, linears = _region()
    policy = Policy(QuantSpec(4, PerGroup(32)), lm_head=None, embedding=None)
    for again in (False, True):
        step = Gptq(policy)
        step.call(region)
        assert sorted(d.node for d in step.decisions) == sorted(linear.name for linear in linears)
        reasons = {d.reason for d in step.decisions if d.node != "lm_head"}
        assert reasons == {"its weight is rounded already, for a node of an earlier segment" if again else
                           "error-compensated"}  # fmt: skip


def test_weights_of_one_input_are_fitted_to_the_same_rows_on_several_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what passes before have left of them: made anew, their Gram matrix has other last bits, so that codes would
    depend on who of several threads comes first.
    """
    region, linears = _region()
    first, body, seen = linears[0], QuantSpec(4, PerGroup(32)), []
    x = np.random.default_rng(0).standard_normal((200, first.shape[0])).astype(np.float32)
    statistics = replace(_statistics(x), sample=x, rest=np.zeros(x.shape[1], np.float32))
    left, region.statistics[first.activation] = statistics.split(), statistics

    def spied(wanted: Beside, spec: QuantSpec, given: Statistics, *more: object) -> Quantized | None:
        seen.append((spec.bits, given.split()))
        return fitted(wanted, spec, given, *more)

    monkeypatch.setattr(gptq, "fitted", spied)
    with limited(1):
        Gptq(Policy(body, None, None, named=[(first.name, replace(body, bits=8))])).call(region)
    seen = [own for own in seen if own[1] is not None]  # of the other inputs no rows are known
    assert sorted(bits for bits, _ in seen) == [4, 8]
    assert all(parts is left for _, parts in seen)
    assert statistics.split() is not left, "large, and of no more use"


def _check_rounded(region: Region, linear, error: float, spec: QuantSpec) -> None:
    """q, k, gate and up share inputs and are rounded side by side: each as it would be alone."""
    statistics, w = region.statistics[linear.activation], linear.read()
    joint, alone = weight_state(linear.weight).codes[False], ErrorCompensated()(w, spec, statistics)
    np.testing.assert_array_equal(joint.codes, alone.codes)
    assert isinstance(linear.weight, ir.Value)
    delta = alone.dequantize().astype(np.float64) - w
    gram = statistics.gram.astype(np.float64)
    wanted = np.sqrt(np.sum(delta * (gram @ delta)) / np.sum(w * (gram @ w)))
    assert error == pytest.approx(wanted, rel=1e-3)
