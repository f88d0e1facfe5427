"""smooth: outliers move into the weights, the output stays, and the quantized output error falls where it should."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import opened

from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.held import FEWEST_KNOWN
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import relative_error, round_to_nearest
from qcompile.passes.smooth import Smooth, levelled, smoothing_factor, standing_out
from qcompile.passes.spec import ActivationSpec, PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics

K, N = 64, 96
SPEC = QuantSpec(4, PerGroup(32))
POLICY = Policy(SPEC, lm_head=None, embedding=None)
POLICY8 = Policy(QuantSpec(8, PerGroup(32)), lm_head=None, embedding=None)


def outlier_model(*, outliers: bool = True, seed: int = 0) -> tuple[ir.Model, np.ndarray]:
    """x → gamma → two linears, and inputs x (rows, K); with a few channels thirty times as loud."""
    rng = np.random.default_rng(seed)
    gamma = np.ones(K, np.float32)
    if outliers:
        gamma[[3, 17, 40]] = 30
    b = Builder(opset=21)
    v = b.Mul(b.input("x", ir.DataType.FLOAT, ["rows", K]), b.weight("gamma", gamma), name="norm")
    left, right = (rng.standard_normal((K, n)).astype(np.float32) for n in (N, N // 2))
    model = b.model({"y": b.MatMul(v, left, name="left"), "z": b.MatMul(v, right, name="right")})
    return model, rng.standard_normal((400, K)).astype(np.float32)


def observed(model: ir.Model, feeds: dict[str, np.ndarray]) -> Region:
    """The whole model with the statistics of every linear's input."""
    region = Region.whole(model)
    values = list(dict.fromkeys(linear.activation for linear in find_linears(model.graph)))
    proto = ir.to_proto(model)
    for value in values:
        proto.graph.output.add().name = value.name
    session = opened(proto.SerializeToString())
    for value, x in zip(values, session.run([value.name for value in values], feeds), strict=True):
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
        region.statistics[value] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0))
    return region


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    results = opened(model).run(None, feeds)
    return np.concatenate([result.reshape(-1) for result in results])


def errors(region: Region) -> dict[str, float]:
    """The relative output error of every linear, were it rounded now."""
    found = {}
    for linear in find_linears(region.live_nodes()):
        w, statistics = linear.read(), region.statistics[linear.activation]
        found[linear.name] = relative_error(round_to_nearest(w, SPEC, statistics).dequantize() - w, w, statistics.gram)
    return found


@pytest.mark.parametrize("alpha", ["auto", 0.5])
def test_error_falls_where_outliers_are_planted(alpha: float | str) -> None:
    model, x = outlier_model()
    region = observed(model, {"x": x})
    before, reference, nodes = errors(region), outputs(model, {"x": x}), len(model.graph)
    smooth = Smooth(POLICY, round_to_nearest, alpha=alpha)
    smooth.call(region)
    assert [decision.action for decision in smooth.decisions] == ["folded"]
    assert smooth.decisions[0].detail["relative_loss"] < 0.5
    after = errors(region)
    assert all(after[name] < 0.7 * before[name] for name in ("left", "right"))
    assert len(model.graph) == nodes
    np.testing.assert_allclose(outputs(model, {"x": x}), reference, atol=1e-5 * np.abs(reference).max())


def test_statistics_match_the_smoothed_graph() -> None:
    model, x = outlier_model()
    region = observed(model, {"x": x})
    Smooth(POLICY, round_to_nearest, alpha=0.6).call(region)
    fresh = observed(model, {"x": x})
    for value, statistics in fresh.statistics.items():
        np.testing.assert_allclose(region.statistics[value].gram, statistics.gram, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(region.statistics[value].absmax, statistics.absmax, rtol=1e-5)


def test_auto_leaves_an_even_activation_alone() -> None:
    model, x = outlier_model(outliers=False)
    gamma = model.graph.initializers["gamma"].const_value
    smooth = Smooth(POLICY, round_to_nearest)
    smooth.call(observed(model, {"x": x}))
    assert [(d.action, d.reason) for d in smooth.decisions] == [("skipped", "no alpha lowers the output error")]
    assert model.graph.initializers["gamma"].const_value is gamma


def test_reasons_without_anything_to_judge() -> None:
    model, x = outlier_model()
    region = observed(model, {"x": x})
    none = Smooth(Policy(SPEC, None, None, exclude=("*",)), round_to_nearest)
    none.call(region)
    assert none.decisions[0].reason == "none of its linears is quantized: excluded by '*'"
    region.statistics.clear()
    blind = Smooth(POLICY, round_to_nearest)
    blind.call(region)
    assert blind.decisions[0].reason == "its input was not observed"


def test_dead_channels_and_zero_weights_make_no_nan() -> None:
    activation, weight = np.array([0, 4, 1, 1], np.float32), np.array([1, 1, 0, 0.25], np.float32)
    factor = smoothing_factor(activation, weight, 0.5)
    np.testing.assert_allclose(factor, [1, 1, 1, 1])
    np.testing.assert_allclose(smoothing_factor(activation, weight, 1.0), [1, 2, 1, 0.5])


def test_all_zero_inputs_are_skipped() -> None:
    model, x = outlier_model()
    smooth = Smooth(POLICY, round_to_nearest, alpha=0.5)
    smooth.call(observed(model, {"x": 0 * x}))
    assert smooth.decisions[0].action == "skipped"


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "half"])
def test_bad_alpha(alpha: float | str) -> None:
    with pytest.raises(UserError, match="alpha must be"):
        Smooth(POLICY, round_to_nearest, alpha=alpha)


def test_tiny_decoder_twice_gives_the_same_bytes() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (4, 32))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    results = []
    for _ in range(2):
        model = tiny_decoder()
        region, reference = observed(model, feeds), outputs(model, feeds)
        smooth = Smooth(POLICY, round_to_nearest)
        smooth.call(region)
        assert any(decision.action == "folded" for decision in smooth.decisions)
        np.testing.assert_allclose(outputs(model, feeds), reference, atol=1e-4 * np.abs(reference).max())
        results.append((smooth.decisions, {n: v.const_value.tobytes() for n, v in model.graph.initializers.items()}))
    assert results[0] == results[1]


def _with_sample(model: ir.Model, x: np.ndarray) -> Region:
    """`observed`, with all rows as the sample."""
    region = observed(model, {"x": x})
    for value, known in region.statistics.items():
        rows = x * model.graph.initializers["gamma"].const_value.numpy()
        region.statistics[value] = Statistics(len(x), known.gram, known.absmax, rows, np.zeros(K, np.float32))
    return region


@pytest.mark.parametrize("rows", [FEWEST_KNOWN, 64, 200])
def test_few_rows_level_the_outliers_that_stand_out_in_each(rows: int) -> None:
    """Of fewer than four a channel; as many channels as four rows each tell of, and all others stay as they are."""
    model, x = outlier_model()
    smooth = Smooth(POLICY8, round_to_nearest, ActivationSpec())
    smooth.call(_with_sample(model, x[:rows]))
    (decision,) = smooth.decisions
    assert decision.action == "folded"
    count = int(decision.reason.split()[2])
    assert decision.reason == f"the loudest {count} of {K} channels"
    assert 3 <= count <= rows // 4
    gamma = model.graph.initializers["gamma"].const_value.numpy()
    loud = gamma[[3, 17, 40]]
    assert (loud < 10).all(), "of thirty"
    others = np.delete(gamma, [3, 17, 40])
    assert (np.isclose(others, others.max())).sum() >= K - count


def test_few_rows_without_outliers_are_left_alone() -> None:
    model, x = outlier_model(outliers=False)
    smooth = Smooth(POLICY8, round_to_nearest, ActivationSpec())
    smooth.call(_with_sample(model, x[:32]))
    assert [decision.action for decision in smooth.decisions] == ["skipped"]
    smooth = Smooth(POLICY8, round_to_nearest, ActivationSpec())
    smooth.call(_with_sample(outlier_model()[0], x[:7]))
    assert "too few to hold any aside" in smooth.decisions[0].reason
    smooth = Smooth(POLICY8, round_to_nearest, ActivationSpec())
    smooth.call(_with_sample(outlier_model()[0], x[: FEWEST_KNOWN - 1]))
    assert "seen on 31 rows, too few to know how far any channel goes (at least 32 rows)" in smooth.decisions[0].reason


@pytest.mark.parametrize(
    ("peaks", "most", "counts"),
    [
        ([1, 1, 30, 1, 25], 4, [2]),
        ([1, 1, 30, 1, 25], 1, []),
        ([27, 11, 5, 4.9, 4, 3, 2], 6, []),  # one is left as near to the end as the one before was brought
        ([100, 20, 1, 1], 3, [1, 2]),
        ([5, 0, 0], 2, []),
    ],
)
def test_channels_that_stand_out_from_all_others(peaks: list[float], most: int, counts: list[int]) -> None:
    assert standing_out(np.array(peaks, np.float32), most) == counts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100, width=32, allow_subnormal=False), min_size=2, max_size=20), st.data())
def test_levelled(peaks: list[float], data: st.DataObject) -> None:
    """Behind it the loudest are four times as loud as the next one; no other changes, none where none stands out."""
    activation, count = np.array(peaks, np.float32), data.draw(st.integers(1, len(peaks) - 1))
    factor = levelled(activation, count)
    end = np.sort(activation)[-count - 1] * np.float32(4)
    assert (factor >= 1).all()
    assert (factor[activation <= end] == 1).all()
    if activation.max() < 2 * end:
        assert (factor == 1).all()
    elif end > 0:
        np.testing.assert_allclose((activation / factor).max(), end, rtol=1e-5)
