"""rotate: outputs stay, errors fall where outliers are planted, and every product has its reason."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import InlinePass
from opened import opened

from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.gptq import ErrorCompensated
from qcompile.passes.held import row_weights
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rotate import Rotate
from qcompile.passes.rotation import Rotation
from qcompile.passes.rounding import round_to_nearest, round_with_clip
from qcompile.passes.spec import ActivationSpec, PerGroup, QuantSpec
from qcompile.passes.state import set_weight
from qcompile.passes.statistics import Statistics

SPEC = QuantSpec(4, PerGroup(64))
POLICY = Policy(SPEC, lm_head=None, embedding=None)
NO_GAIN = "turning its input leaves too much of the squared error for a node at run time"


def products(k: int, widths: tuple[int, ...] = (24, 9), *, kind: str = "fp32", tails: bool = False) -> ir.Model:
    """x (batch, rows, k) into products of several widths and, beside them, into an Add with a constant.

    tails: weights with a few large numbers in each column, which cost a rounding to groups its precision.
    """
    rng, b = np.random.default_rng(k), Builder(opset=21, dtype=kind)
    dtype = ir.DataType.FLOAT if kind == "fp32" else ir.DataType.FLOAT16
    x = b.input("x", dtype, ["batch", "rows", k])
    outputs = {"beside": b.Add(x, np.ones(k, np.float32), name="beside")}
    for number, width in enumerate(widths):
        w = rng.standard_normal((k, width)).astype(np.float32) / np.sqrt(k)
        if tails:
            w[rng.random(w.shape) < 0.02] *= 12
        outputs[f"y{number}"] = b.Add(b.MatMul(x, w, name=f"linear{number}"), np.ones(width, np.float32))
    return b.model(outputs)


def region_of(model: ir.Model, x: np.ndarray | None = None) -> Region:
    region = Region.whole(model)
    if x is not None:
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
        value = find_linears(model.graph)[0].activation
        groups = np.arange(len(x)).repeat(x.shape[1])
        rest = np.zeros(rows.shape[1], np.float32)
        region.statistics[value] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), rows, rest, groups)
    return region


def given_x(k: int, kind: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 60, k)).astype(kind)


def told(rotate: Rotate) -> dict[str, tuple[str, str]]:
    return {own.node: (own.action, own.reason) for own in rotate.decisions}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans(), st.integers(0, 3))
def test_outputs_stay(k: int, widths: list[int], half: bool, rank: int) -> None:
    model = products(k, tuple(widths), kind="fp16" if half else "fp32")
    x = given_x(k, np.float16 if half else np.float32)[:, : 2 * rank]
    before = opened(model).run(None, {"x": x})
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(region_of(model, given_x(k)) if half else Region.whole(model))
    action = "skipped" if k % 16 else "rotated"
    assert [own.action for own in rotate.decisions] == [action] * len(widths)
    assert Counter(node.op_type for node in model.graph)["Hadamard"] == (0 if k % 16 else 1)
    limit = 5e-3 if half else 1e-5
    for old, new in zip(before, opened(model).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=limit * (1 + float(np.abs(old).max(initial=0))))


def test_one_node_and_one_matrix_for_all_products_of_an_input() -> None:
    model = products(128, (8, 8, 8))
    Rotate(POLICY, round_to_nearest, judge=False).call(Region.whole(model))
    (node,) = [own for own in model.graph if own.op_type == "Hadamard"]
    assert [linear.activation for linear in find_linears(model.graph)] == [node.outputs[0]] * 3
    assert [name for name in model.graph.initializers if "hadamard" in name] == ["qcompile.hadamard.64.float"]
    assert len([own for own in model.graph if own.op_type == "Add" and own.inputs[0] is node.inputs[0]]) == 1


@pytest.mark.parametrize("rounding", [round_with_clip, ErrorCompensated(sweeps=0, refit=False)])
def test_turned_where_rows_held_aside_gain(rounding: object) -> None:
    x = given_x(128)
    for tails in (True, False):
        model = products(128, (200, 100), tails=tails)
        rotate = Rotate(POLICY, rounding)  # type: ignore[arg-type]
        rotate.call(region_of(model, x))
        expected = ("rotated", "in blocks") if tails else ("skipped", NO_GAIN)
        assert told(rotate) == {"linear0": expected, "linear1": expected}
        (share,) = {own.detail["relative_loss"] for own in rotate.decisions}
        assert share < 0.8 if tails else 0.9 < share < 1.3


def test_what_it_gains_is_what_is_left_of_the_error() -> None:
    """Of other rows, and of the whole weights."""
    model, x = products(128, (300,), tails=True), given_x(128)
    (linear,) = find_linears(model.graph)
    rows, w = given_x(128, seed=1).reshape(-1, 128), linear.read()
    rotate, region = Rotate(POLICY, round_with_clip), region_of(model, x)
    plain = rows @ (round_with_clip(w, SPEC, region.statistics[linear.activation]).dequantize() - w)
    rotate.call(region)
    (linear,) = find_linears(model.graph)
    turned = opened_rows(model, linear.activation, rows)
    w = linear.read()
    other = turned @ (round_with_clip(w, SPEC, region.statistics[linear.activation]).dequantize() - w)
    share = rotate.decisions[0].detail["relative_loss"]
    assert np.square(other).sum() / np.square(plain).sum() == pytest.approx(share, rel=0.15)


def opened_rows(model: ir.Model, value: ir.Value, rows: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    proto.graph.output.add().name = str(value.name)
    (found,) = opened(proto.SerializeToString()).run([str(value.name)], {"x": rows[None]})
    return np.asarray(found[0])


def test_without_data_the_weights_tell() -> None:
    for tails in (True, False):
        model = products(128, (200,), tails=tails)
        rotate = Rotate(POLICY, ErrorCompensated())
        rotate.call(Region.whole(model))
        assert told(rotate)["linear0"][0] == ("rotated" if tails else "skipped")


def test_statistics_follow() -> None:
    model, x = products(128, (16,), tails=True), given_x(128)
    region = region_of(model, x)
    Rotate(POLICY, round_with_clip, judge=False).call(region)
    (linear,) = find_linears(region.live_nodes())
    rows = opened_rows(model, linear.activation, x.reshape(-1, 128))
    np.testing.assert_allclose(region.statistics[linear.activation].gram, rows.T @ rows, rtol=0, atol=1e-2)
    assert list(region.statistics) == [linear.activation], "a Gram matrix that nobody reads any more is held"


def test_who_else_reads_a_weight_is_a_reason() -> None:
    b, w = Builder(opset=21), np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    x, shared = b.input("x", ir.DataType.FLOAT, ["n", 64]), b.weight("w", w)
    other = b.input("other", ir.DataType.FLOAT, ["n", 64])
    y = b.MatMul(x, shared, name="first")
    model = b.model({"y": y, "z": b.MatMul(other, shared, name="second")})
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(Region.whole(model))
    reasons = {"first": ("skipped", "w is also read by second"), "second": ("skipped", "w is also read by first")}
    assert told(rotate) == reasons
    b = Builder(opset=21)
    x, shared = b.input("x", ir.DataType.FLOAT, ["n", 64]), b.weight("w", w)
    turned = b.MatMul(x, b.Transpose(shared, perm=[1, 0]), name="second")
    model = b.model({"y": b.MatMul(x, shared, name="first"), "z": turned})
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(Region.whole(model))
    assert told(rotate) == dict.fromkeys(("first", "second"), ("skipped", "the weight w is read both ways round"))


def test_what_stays_in_float_reads_what_it_did() -> None:
    model = products(64, (8, 8))
    value = find_linears(model.graph)[0].activation
    rotate = Rotate(Policy(SPEC, None, None, exclude=["linear1"]), round_to_nearest, judge=False)
    rotate.call(Region.whole(model))
    assert told(rotate)["linear1"] == ("skipped", "excluded by 'linear1'")
    assert [linear.activation is value for linear in find_linears(model.graph)] == [False, True]


def test_codes_of_an_earlier_segment_are_a_reason() -> None:
    model = products(64, (8,))
    (linear,) = find_linears(model.graph)
    set_weight(linear.weight, codes={False: round_to_nearest(linear.read(), SPEC, None)})
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(Region.whole(model))
    assert "rounded already" in told(rotate)["linear0"][1]


def test_a_half_input_that_would_overflow_stays() -> None:
    rotation = Rotation.of(64, 0)
    assert rotation is not None
    model, x = products(64, (8,), kind="fp16"), given_x(64) * 0 + 6e3 * rotation.signs
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(region_of(model, x))
    assert told(rotate)["linear0"] == ("skipped", "turned, its input might leave the range of float16")


def test_a_half_input_that_no_row_tells_of_stays() -> None:
    """Guessed statistics are none."""
    for guess in (False, True):
        model = products(64, (8,), kind="fp16")
        region = Region.whole(model)
        if guess:
            value = find_linears(model.graph)[0].activation
            region.statistics[value] = Statistics(9, np.eye(64, dtype=np.float32), np.ones(64, np.float32))
        rotate = Rotate(POLICY, round_to_nearest, judge=False)
        rotate.call(region)
        ((action, reason),) = told(rotate).values()
        assert (action, "awq and gptq have them collected" in reason) == ("skipped", True)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([16, 64, 96]), st.floats(1, 6e4), st.integers(1, 64), st.integers(0, 2**16))
def test_no_half_input_overflows_by_a_row_outside_the_sample(k: int, loud: float, count: int, seed: int) -> None:
    rng, model = np.random.default_rng(seed), products(k, (8,), kind="fp16")
    rotation, rows = Rotation.of(k, 0), rng.standard_normal((400, k)).astype(np.float32)
    assert rotation is not None
    worst = np.tile(rotation.signs, k // len(rotation.signs))
    rows[-1, rng.permutation(k)[:count]] = np.float32(loud)
    rows[-1] *= worst
    region = region_of(model)
    value = find_linears(model.graph)[0].activation
    sample, rest = rows[::4], np.abs(np.delete(rows, slice(None, None, 4), axis=0)).max(axis=0)
    peaks = np.abs(rows).max(axis=0)
    region.statistics[value] = Statistics(len(rows), rows.T @ rows, peaks, sample, rest)
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(region)
    if told(rotate)["linear0"][0] == "rotated":
        (linear,) = find_linears(model.graph)
        assert np.abs(opened_rows(model, linear.activation, rows.astype(np.float16))).max() < 3.1e4
    else:
        assert np.linalg.norm(peaks) > 3e4


def test_a_half_input_loud_in_one_row_of_many_stays() -> None:
    rotation, rows = Rotation.of(64, 0), np.random.default_rng(0).standard_normal((16000, 64)).astype(np.float32)
    assert rotation is not None
    rows[-1] = 2e4 * rotation.signs
    model = products(64, (8,), kind="fp16")
    region, value = region_of(model), find_linears(model.graph)[0].activation
    sample, rest = rows[:1024], np.abs(rows[1024:]).max(axis=0)
    region.statistics[value] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), sample, rest)
    assert region.statistics[value].rotated(rotation).absmax.max() < 3e4 < np.abs(rotation.turned(rows)).max()
    rotate = Rotate(POLICY, round_to_nearest, judge=False)
    rotate.call(region)
    assert told(rotate)["linear0"] == ("skipped", "turned, its input might leave the range of float16")


def test_rows_of_extreme_norm_count_as_four_times_the_median() -> None:
    x = given_x(64).reshape(-1, 64)
    x[0] *= 1000
    region = Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), x)
    found, median = row_weights(x, region), float(np.median(np.linalg.norm(x, axis=1)))
    np.testing.assert_array_equal(found[1:], 1)
    assert np.sqrt(found[0]) * np.linalg.norm(x[0]) == pytest.approx(4 * median, rel=1e-4)


@pytest.mark.parametrize("loud", [1, 40])
def test_activations_on_a_grid_gain_where_they_have_outliers(loud: float) -> None:
    """A channel forty times as loud takes the common step of int8 with it."""
    model, x = products(128, (200,)), given_x(128)
    x[..., 5] *= loud
    rotate = Rotate(Policy(QuantSpec(8, PerGroup(64)), None, None), round_to_nearest, ActivationSpec())
    rotate.call(region_of(model, x))
    (decision,) = rotate.decisions
    share = decision.detail["relative_loss"]
    assert (decision.action, share < 0.2) == ("rotated", True) if loud > 1 else 0.8 < share < 1.1


@pytest.mark.parametrize(("target", "turned"), [("qcompile", True), ("matmulnbits", False), ("qdq", False)])
def test_a_node_without_a_kernel_must_gain_a_twentieth(
    target: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, expected in ((0.97, turned), (0.94, True), (0.999, False)):
        monkeypatch.setattr("qcompile.passes.rotate.share_left", lambda *_, share=share: share)
        rotate = Rotate(Policy(SPEC, None, None, target=target), round_to_nearest)
        rotate.call(Region.whole(products(64, (8,))))
        assert told(rotate) == {"linear0": ("rotated", "in blocks") if expected else ("skipped", NO_GAIN)}


def test_the_matrix_of_a_file_that_was_compiled_before_stays() -> None:
    """Where the body stands in the graph, it is a product with a constant."""
    model = products(64, (8,))
    Rotate(POLICY, round_to_nearest, judge=False).call(Region.whole(model))
    InlinePass()(model)
    turning, linear = find_linears(model.graph)
    assert POLICY.for_linear(turning, None) == "it turns the channels of products' inputs"
    assert POLICY.for_linear(linear, None) == SPEC
