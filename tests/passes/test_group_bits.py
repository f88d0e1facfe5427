"""group_bits: products are split exactly, bits stay in the mean, errors fall where few groups are loud."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Bench
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import opened

from qcompile.compiler.recipe import Step
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.group_bits import GroupBits, choose, left_of
from qcompile.passes.linears import find_linears
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.passes.state import Outliers, node_state, set_node, set_weight, weight_state
from qcompile.passes.statistics import Statistics

K, SIZE = 136, 16  # eight whole groups and a partial one
SPEC = QuantSpec(3, PerGroup(SIZE))
POLICY = Policy(SPEC, None, None)


def _model(dtype: str = "fp32", *, shared: bool = False) -> ir.Model:
    rng, b = np.random.default_rng(0), Builder(opset=21, dtype=dtype)
    x = b.input("x", b.dtype, ["batch", "rows", K])
    weights = [b.weight(f"w{i}", rng.standard_normal((K, 24 + 9 * i)).astype(np.float32) / K**0.5) for i in range(2)]
    made = {f"y{i}": b.MatMul(x, w, name=f"linear{i}") for i, w in enumerate(weights)}
    if shared:
        made["z"] = b.MatMul(b.input("x2", b.dtype, ["rows", K]), weights[0], name="other")
    return b.model(made)


def _x(loud: int = 2, seed: int = 0) -> np.ndarray:
    """Rows of which the channels of the groups 1, 2, … are twenty times as loud as the others."""
    x = np.random.default_rng(seed).standard_normal((4, 60, K)).astype(np.float32)
    x[..., SIZE : SIZE * (1 + loud)] *= 20
    return x


def _split(model: ir.Model, x: np.ndarray, policy: Policy = POLICY, **parameters: float) -> tuple[GroupBits, Region]:
    region, rows = Region.whole(model), x.reshape(-1, K)
    value = find_linears(model.graph)[0].activation
    groups, rest = np.arange(len(x)).repeat(x.shape[1]), np.zeros(K, np.float32)
    region.statistics[value] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), rows, rest, groups)
    own = GroupBits(policy, **parameters)
    own.call(region)
    return own, region


def _reasons(own: GroupBits) -> dict[str, tuple[str, str]]:
    return {decision.node: (decision.action, decision.reason) for decision in own.decisions}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 4e-3)])
def test_the_parts_add_up_to_the_product(dtype: str, tolerance: float) -> None:
    x = _x().astype(np.float32 if dtype == "fp32" else np.float16)
    wanted = opened(_model(dtype)).run(None, {"x": x})
    model = _model(dtype)
    own, region = _split(model, x.astype(np.float32))
    assert {action for action, _ in _reasons(own).values()} == {"split"}
    found = opened(model).run(None, {"x": x})
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
    assert "w0" not in model.graph.initializers
    # One Gather for each part, whatever the number of products; statistics are those of the channels.
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    assert len(gathers) == 3
    for node in gathers:
        channels = node.inputs[1].const_value.numpy()
        rows = x.reshape(-1, K)[:, channels].astype(np.float32)
        known = region.statistics[node.outputs[0]]
        np.testing.assert_allclose(known.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
        np.testing.assert_array_equal(known.sample, rows)


def test_the_loud_groups_have_a_bit_more_and_as_many_rows_one_less() -> None:
    model = _model()
    _split(model, _x())
    rows: dict[int, list[int]] = {}
    for linear in find_linears(model.graph):
        grid = node_state(linear.node).grid
        assert isinstance(grid, QuantSpec)
        assert POLICY.for_linear(linear, None) is grid
        channels = linear.activation.producer().inputs[1].const_value.numpy()
        rows.setdefault(grid.bits, channels.tolist())
    assert set(range(SIZE, 3 * SIZE)) <= set(rows[4])
    assert len(rows[2]) == len(rows[4])
    assert sorted(rows[2] + rows[3] + rows[4]) == list(range(K))
    assert set(range(K // SIZE * SIZE, K)) <= set(rows[3])  # the partial group


def test_the_error_falls_on_rows_that_were_not_seen() -> None:
    """Three bits each, or in the mean: of the squared error of rounding, at most two thirds are left."""
    unseen, errors = _x(seed=1), list[float]()
    wanted = opened(_model()).run(None, {"x": unseen})
    for split in (False, True):
        model = _model()
        region = _split(model, _x())[1] if split else Region.whole(model)
        Pack(POLICY).call(Region(model, list(model.graph)))
        assert region.model is model
        found = opened(model).run(None, {"x": unseen})
        errors.append(
            sum(float(np.square(a - b).mean() / np.square(b).mean()) for a, b in zip(found, wanted, strict=True))
        )
    assert errors[1] < errors[0] * 2 / 3


@pytest.mark.parametrize(
    ("policy", "x", "reason"),
    [
        (POLICY, _x(loud=0), "no groups are worth products of their own"),
        (POLICY, _x()[:1, :6], "seen on 6 rows, too few"),
        (Policy(QuantSpec(8, PerGroup(SIZE)), None, None), _x(), "int8 has no format of one bit less"),
        (Policy(QuantSpec(3, PerChannel(1)), None, None), _x(), "all of its rows share a scale"),
        (Policy(QuantSpec(4, PerGroup(SIZE)), None, None, target="matmulnbits"), _x(), "has no operator for int3"),
        (Policy(SPEC, None, None, named=[("linear1", QuantSpec(4, PerGroup(SIZE)))]), _x(), "several formats"),
        (Policy(SPEC, None, None, exclude=["*"]), _x(), "excluded by"),
    ],
)
def test_products_that_stay_whole_have_a_reason(policy: Policy, x: np.ndarray, reason: str) -> None:
    model = _model()
    own, _ = _split(model, x, policy)
    assert [(action, reason in told) for action, told in _reasons(own).values()] == [("skipped", True)] * 2
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2


def test_a_weight_that_others_read_stays() -> None:
    model = _model(shared=True)
    own, _ = _split(model, _x())
    assert _reasons(own)["linear0"] == ("skipped", "another node reads its weight, too")
    assert "w0" in model.graph.initializers


def test_what_is_chosen_for_whole_products_is_not_lost() -> None:
    """Codes and channels of a whole product say nothing of its parts; whether ranges may be clipped does."""
    marked, coded, clipped = _model(), _model(), _model()
    set_node(find_linears(marked.graph)[1].node, outliers=Outliers(np.array([3])))
    weight = find_linears(coded.graph)[0].weight
    set_weight(weight, codes={False: round_to_nearest(np.ones((K, 24), np.float32), SPEC, None)})
    for model, reason in ((marked, "channels of its input stay in float already"), (coded, "its codes are chosen")):
        own, _ = _split(model, _x())
        assert [(action, reason in told) for action, told in _reasons(own).values()] == [("skipped", True)] * 2
    for linear in find_linears(clipped.graph):
        set_weight(linear.weight, clip=False)
    _split(clipped, _x())
    assert [weight_state(linear.weight).clip for linear in find_linears(clipped.graph)] == [False] * 6


def test_a_threshold_is_a_share() -> None:
    with pytest.raises(UserError, match="threshold must lie between 0 and 1, got 1"):
        GroupBits(POLICY, threshold=1)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3, width=32), min_size=0, max_size=12), st.floats(1, 6), st.floats(0, 1))
def test_a_choice_never_makes_the_sum_worse(own: list[float], worse: float, better: float) -> None:
    errors = np.array([np.multiply(own, worse), own, np.multiply(own, better)], np.float64).reshape(3, -1)
    choice = choose(errors)
    assert len(choice.low) == len(choice.high)
    assert not set(choice.low) & set(choice.high)
    assert choice.left == left_of(errors, choice)
    assert choice.left <= 1


@pytest.mark.parametrize("passes", ["group_bits,pack", "group_bits,rotate,gptq,pack"])
def test_a_decoder_is_compiled_with_the_bits_of_the_format(bench: Bench, passes: str) -> None:
    source = bench.save(tiny_decoder(hidden=128, ffn=256, layers=1, heads=4))
    own = Step("int3", {"group": 32})
    reports = [
        bench.compile(source, name, output=f"{number}/model.onnx", weights=own, lm_head="keep", embedding="keep")
        for number, name in enumerate((passes.replace("group_bits,", ""), passes))
    ]
    actions = {decision.action for decision in reports[1].decisions["group_bits"]}
    assert "split" in actions
    formats = {decision.format for decision in reports[1].decisions["pack"] if decision.action == "quantized"}
    assert {"int2", "int4"} <= formats
    assert reports[1].coverage == 1.0
    assert Path(bench.folder / "1" / "model.onnx").exists()
    bits = [
        sum(own.detail["bits_per_weight"] * own.detail["weights"] for own in report.decisions["pack"] if own.format)
        / sum(own.detail["weights"] for own in report.decisions["pack"] if own.format)
        for report in reports
    ]
    assert bits[1] == pytest.approx(bits[0], rel=0.02)


def test_a_list_without_pack_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_decoder(layers=1))
    message = "pass 'group_bits' must be followed by pack: add it to --passes after group_bits"
    bench.refuses(capsys, source, ["--passes", "group_bits,qdq"], message)
