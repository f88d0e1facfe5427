"""Pass kv: caches in codes, as ONNX Runtime's GroupQueryAttention reads and writes them."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from fusing import fuse_attention, nodes_of
from graphs import decoders
from graphs.table import Graph
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import INT8_SYM, observe

from qcompile.compiler.data.inputs import input_plan
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.contrib.appended import Appended
from qcompile.passes.contrib.codes import CacheCodes, codes_of
from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.kv import Kv
from qcompile.passes.contrib.written import Written, written
from qcompile.passes.errors import UserError
from qcompile.passes.graph import add_initializer
from qcompile.passes.observers.caches import CachePeaks
from qcompile.passes.prepare import Prepare
from qcompile.runtime.sessions import session

Array = npt.NDArray[Any]
_PEAKS = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12)


# Codes


@given(peaks=_PEAKS, channels=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_nothing_that_was_seen_is_clipped(peaks: list[float], channels: bool, seed: int) -> None:
    """Numbers up to the peaks, these themselves among them, lie within half a step of their codes."""
    tops = np.array(peaks, np.float32)[None]
    codes = CacheCodes.spanning(tops, 8, channels=channels)
    x = np.random.default_rng(seed).uniform(-1, 1, (2, 1, 5, len(peaks))).astype(np.float32) * tops
    x[0, 0, 0], x[0, 0, 1] = tops, -tops
    made = codes.encode(x)
    assert np.abs(made.astype(int)).max() <= 127
    assert codes.scale.shape == (tops.shape if channels else ())
    step = codes.scale if channels else np.broadcast_to(codes.scale, tops.shape)
    assert (np.abs(codes.decode(made) - x) <= step[:, None] * 0.5001).all()


@given(peaks=_PEAKS)
def test_scales_are_numbers_whatever_was_seen(peaks: list[float]) -> None:
    """A channel of zeros has no scale of 0, and no step above that of the loudest channel."""
    scale = CacheCodes.spanning(np.array(peaks, np.float32)[None], 8, channels=True).scale
    assert np.isfinite(scale).all()
    assert (scale > 0).all() or max(peaks) < 1e-35
    assert scale.max() <= max(max(peaks), 1) / 126.9


# What is observed


def _turned(x: Array, angles: Array, pairs: int, interleaved: bool) -> Array:
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else np.split(part, 2, -1)
    ends = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    turned = np.stack(ends, -1).reshape(part.shape) if interleaved else np.concatenate(ends, -1)
    return np.concatenate([turned, rest], -1)


@settings(max_examples=25, deadline=None)
@given(pairs=st.integers(0, 4), interleaved=st.booleans(), seed=st.integers(0, 2**32 - 1), channels=st.booleans())
def test_keys_fit_their_codes_at_every_position(pairs: int, interleaved: bool, seed: int, channels: bool) -> None:
    """Whatever angles their pairs are turned by further on; what is not turned keeps its own range."""
    random = np.random.default_rng(seed)
    batches = [(random.standard_normal((2, 3, rows, 8)) * 3).astype(np.float32) for rows in (4, 1, 7)]
    seen = observe(CachePeaks("x", 8, pairs, interleaved=interleaved), batches)
    assert seen.high is not None
    whole = np.concatenate(batches, 2)
    alone = slice(2 * pairs, None)
    np.testing.assert_array_equal(seen.high[:, alone], np.abs(whole[..., alone]).max((0, 2)))
    codes = CacheCodes.spanning(seen.high, 8, channels=channels)
    turned = _turned(whole, random.uniform(-9, 9, (*whole.shape[:-1], pairs)), pairs, interleaved)
    assert np.abs(codes.encode(turned.astype(np.float32)).astype(int)).max() <= 127
    assert (seen.high >= np.abs(whole).max((0, 2))).all()


def test_few_rows_leave_room_for_others() -> None:
    """Peaks of 4096 rows and more are as they are; those of few are as far within as normal numbers' are."""
    for rows, least, most in ((32, 1.3, 1.7), (512, 1.1, 1.2), (4096, 1, 1)):
        x = np.random.default_rng(0).standard_normal((1, 1, rows, 8)).astype(np.float32)
        seen = observe(CachePeaks("x", 8), [x])
        assert seen.high is not None
        ratio = seen.expected(INT8_SYM)[1] / seen.high
        assert least <= ratio.min() <= ratio.max() <= most


def test_statistics_of_a_cache_go_on_from_a_file() -> None:
    batches = [np.random.default_rng(i).standard_normal((1, 2, 5, 8)).astype(np.float32) for i in range(2)]
    whole, first, second = (observe(CachePeaks("x", 8, 4), own) for own in (batches, batches[:1], []))
    second.restore(first.state())
    observe(second, batches[1:])
    np.testing.assert_array_equal(second.high, whole.high)
    assert second.rows == whole.rows == 10


# The graph


def _kinds() -> Iterable[Any]:
    own: dict[str, Callable[[], ir.Model]] = {
        "grouped": lambda: tiny_decoder(kv_cache=True, outliers=False),
        "one head each": lambda: tiny_decoder(kv_cache=True, kv_heads=4, outliers=False),
        "one cache head": lambda: tiny_decoder(kv_cache=True, kv_heads=1, outliers=False, norm="layer"),
        "outliers": lambda: tiny_decoder(kv_cache=True),
    }
    return (pytest.param(make, id=name) for name, make in own.items())


def coded(model: ir.Model, *, fused: bool = True, **parameters: Any) -> tuple[ir.Model, ir.Model, Kv]:
    """A decoder, the same with caches in codes, by what 3 texts of 40 tokens showed, the pass. fused: its attention."""
    prepared = model.clone()
    Prepare().call(Region.whole(prepared))
    own = Kv(**parameters)
    watched = own.observed(prepared)
    random, running = np.random.default_rng(0), Tokens(prepared)
    for _ in range(3):
        outputs = running(random.integers(0, 256, (1, 40)), np.ones((1, 40), np.int64))
        for observer in watched.values():
            assert isinstance(observer, CachePeaks)
            name, observer.value = observer.value, "x"
            observe(observer, [outputs[name]])
            observer.value = name
    before = fuse_attention(model)[0] if fused else prepared
    after = before.clone()
    own.call(Region.whole(after))
    if not fused:  # standard operators alone
        onnx.checker.check_model(ir.to_proto(after))
    return before, after, own


class Tokens:
    """A decoder in ONNX Runtime that is run with caches of its own type."""

    def __init__(self, model: ir.Model) -> None:
        self.plan, self.own = input_plan(model), session(ir.to_proto(model).SerializeToString())
        self.names = [value.name for value in self.own.get_outputs()]

    def __call__(self, ids: Array, mask: Array, before: dict[str, Array] | None = None) -> dict[str, Array]:
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -ids.shape[1] :]
        feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for pair in self.plan.past:
            feeds[pair.past.name] = pair.empty(len(ids)) if before is None else before[pair.present]
        return dict(zip(self.names, self.own.run(None, feeds), strict=True))


def _run(model: ir.Model, mask: Array, steps: int) -> tuple[Array, dict[str, Array]]:
    """Logits of all tokens but padding: a prompt of the mask, and token by token behind it; the last run's outputs."""
    running, random, found = Tokens(model), np.random.default_rng(7), []
    outputs = running(random.integers(0, 256, mask.shape), mask)
    found.append(outputs["logits"][mask == 1])
    for _ in range(steps):
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
        outputs = running(random.integers(0, 256, (len(mask), 1)), mask, outputs)
        found.append(outputs["logits"][:, 0])
    return np.concatenate(found), outputs


@pytest.mark.parametrize("make", _kinds())
@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("form", ["fused", "plain"])
def test_logits_and_caches_are_near_those_of_floats(make: Callable[[], ir.Model], scales: str, form: str) -> None:
    """Padded on either side, then token by token; of other tokens than calibration saw, so that some are clipped."""
    fused, after, own = coded(make(), fused=form == "fused", scales=scales)
    assert [decision.action for decision in own.decisions] == ["coded"] * (2 if form == "fused" else 4)
    mask = np.ones((3, 9), np.int64)
    mask[0, :4], mask[1, -3:] = 0, 0
    (expected, floats), (found, codes) = (_run(model, mask, 4) for model in (fused, after))
    tolerance = {"channel": 0.01, "tensor": 0.03}[scales]  # some columns of a v_proj are eight times the others
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    plan = input_plan(after)
    assert {pair.past.dtype for pair in plan.past} == {np.dtype(np.int8)}
    for pair in plan.past:
        assert codes[pair.present].dtype == np.int8
        a, b = plan.decoded(codes)[pair.present], floats[pair.present]
        assert np.linalg.norm(a - b) <= 2 * tolerance * np.linalg.norm(b), pair.present


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_known_which_channels_of_keys_are_turned_together(interleaved: bool) -> None:
    model = tiny_decoder(kv_cache=True, outliers=False)
    Prepare().call(Region.whole(model))
    if interleaved:
        model, _ = fuse_attention(model)
        for node in nodes_of(model, "GroupQueryAttention"):
            node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
    for value, observer in Kv().observed(model).items():
        assert isinstance(observer, CachePeaks)
        keys = str(value.name).endswith("key")
        assert (observer.pairs, observer.interleaved) == ((8, interleaved) if keys else (0, interleaved))


def test_half_of_a_rotation_is_the_width_of_its_tables() -> None:
    """Of a head of which a half is turned, as GPT-NeoX has it, the rest keeps ranges of its own."""
    model, _ = fuse_attention(tiny_decoder(kv_cache=True, outliers=False))
    for node in nodes_of(model, "GroupQueryAttention"):
        for slot in (7, 8):
            zeros = ir.tensor(np.zeros((64, 4), np.float32))
            node.replace_input_with(slot, add_initializer(model.graph, f"{node.name}.{slot}", zeros))
    found = Kv().observed(model)
    assert {own.pairs for own in found.values() if isinstance(own, CachePeaks)} == {0, 4}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_operators_round_as_they_are_told(fused: bool, scales: str) -> None:
    """Of the first layer, whose input no cache has changed: the codes are those of `CacheCodes`, but for ties."""
    before, after, _ = coded(tiny_decoder(kv_cache=True, outliers=False), fused=fused, scales=scales)
    (_, floats), (_, codes) = (_run(model, np.ones((2, 30), np.int64), 0) for model in (before, after))
    for pair in input_plan(after).past[:2]:
        assert pair.codes is not None
        wanted, found = pair.codes.encode(floats[pair.present]).astype(int), codes[pair.present].astype(int)
        assert np.abs(wanted - found).max() <= 1
        assert (wanted != found).mean() < 1e-3


def test_a_scale_of_the_whole_cache_is_coarser() -> None:
    errors = {}
    for scales in ("channel", "tensor"):
        fused, after, _ = coded(tiny_decoder(kv_cache=True), scales=scales)
        expected, found = (_run(model, np.ones((1, 30), np.int64), 2)[0] for model in (fused, after))
        errors[scales] = np.linalg.norm(found - expected)
    assert 0 < errors["channel"] < errors["tensor"]


def _half(*, single: bool) -> ir.Model:
    """single: rotations and Softmax are computed in single precision."""
    if not single:
        return tiny_decoder(kv_cache=True, dtype="fp16", outliers=False)
    graph = Graph()
    decoders.Written(half=True).build(graph)
    return ir.from_proto(graph.model())


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("form", ["fused", "plain"])
def test_floats_in_half_precision(form: str, single: bool) -> None:
    fused, after, _ = coded(_half(single=single), fused=form == "fused")
    expected, found = (_run(model, np.ones((2, 7), np.int64), 3)[0].astype(float) for model in (fused, after))
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_caches_that_others_read_stay_with_the_reason() -> None:
    """Of one layer, whose keys of runs before an output of the graph shows besides."""
    model = tiny_decoder(kv_cache=True, outliers=False)
    key = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    shown = ir.node("Neg", [key], name="shown")
    shown.outputs[0].name, shown.outputs[0].type, shown.outputs[0].shape = "shown", key.type, key.shape
    model.graph.append(shown)
    model.graph.outputs.append(shown.outputs[0])
    _, after, own = coded(model)
    assert next((d.action, d.reason) for d in own.decisions) == ("kept", "a Neg reads its caches, too")
    kinds = {value.name: value.dtype for value in after.graph.inputs}
    assert kinds["past_key_values.0.key"] == kinds["past_key_values.0.value"] == ir.DataType.FLOAT
    assert kinds["past_key_values.1.key"] == kinds["past_key_values.1.value"] == ir.DataType.INT8
    assert codes_of(next(value for value in after.graph.inputs if value.name == "past_key_values.0.key")) is None


def _show(model: ir.Model, *names: str) -> None:
    """Add outputs that read these caches."""
    for name in names:
        cache = next(value for value in model.graph.outputs if value.name == name)
        shown = ir.node("Neg", [cache], name=f"{name}.shown")
        shown.outputs[0].name, shown.outputs[0].type, shown.outputs[0].shape = shown.name, cache.type, cache.shape
        model.graph.append(shown)
        model.graph.outputs.append(shown.outputs[0])


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_what_else_reads_a_cache_of_codes_reads_floats(kind: ir.DataType, scales: str) -> None:
    """An output that shows the keys of the first layer, and the values of the second."""
    model = tiny_decoder(kv_cache=True, outliers=False, dtype="fp32" if kind == ir.DataType.FLOAT else "fp16")
    names = ("present.0.key", "present.1.value")
    _show(model, *names)
    before, after, own = coded(model, scales=scales)
    assert [decision.action for decision in own.decisions] == ["coded"] * 2
    (expected, floats), (found, codes) = (_run(made, np.ones((2, 9), np.int64), 2) for made in (before, after))
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    assert np.linalg.norm(found - expected) <= 0.03 * np.linalg.norm(expected)
    for name in names:
        assert codes[name].dtype == np.int8
        wanted, told = (run[f"{name}.shown"].astype(np.float32) for run in (floats, codes))
        assert np.linalg.norm(told - wanted) <= 0.05 * np.linalg.norm(wanted)


def test_models_without_caches_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="kv: the model has no caches to store in codes: export it with --kv-cache"):
        Kv().observed(tiny_decoder())


def test_keys_that_are_turned_in_an_unknown_way_stay_with_the_reason() -> None:
    """What they hold further on cannot be told from what was seen. Values are not turned."""
    model = tiny_decoder(kv_cache=True, outliers=False)
    for node in nodes_of(model, "Cos"):
        node.op_type = "Sin"
    _, after, own = coded(model, fused=False)
    kept = [decision for decision in own.decisions if decision.action == "kept"]
    assert [decision.reason for decision in kept] == ["no rotation by cosines and sines is found before its scores"] * 2
    kinds = {str(value.name): value.dtype for value in after.graph.inputs if "past" in str(value.name)}
    assert {name: kind == ir.DataType.INT8 for name, kind in kinds.items()} == {n: n.endswith("value") for n in kinds}


def test_appended_caches_that_something_else_holds_stay_with_the_reason() -> None:
    model = tiny_decoder(kv_cache=True, outliers=False)
    Prepare().call(Region.whole(model))
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    own = next(node for node in nodes_of(model, "Concat") if past in node.inputs)
    assert isinstance(Appended.of(own, Inputs.of(model.graph)), Appended)
    assert Appended.of(own, "it has two masks") == "it has two masks"
    model.graph.outputs.append(past)
    assert Appended.of(own, "") == "the graph reads it, too"
    model.graph.append(ir.node("Neg", [past], name="shown"))
    assert Appended.of(own, "") == "a Neg reads it, too"
    new = own.inputs[1]
    assert new is not None
    new.shape = None
    assert Appended.of(own, "") == "how many heads it has, and how wide they are, is not known"
    own.resize_inputs(1)
    assert Appended.of(own, "") == "what the graph gives back is not the cache and the rows of a run"


def test_caches_that_more_than_attention_reads_are_multiplied_by_their_scales() -> None:
    """Of the first layer; the others' scales are with their queries and results."""
    model = tiny_decoder(kv_cache=True, outliers=False)
    _show(model, "present.0.key", "present.0.value")
    before, after, own = coded(model, fused=False)
    assert [decision.action for decision in own.decisions] == ["coded"] * 4
    scaled = {node.name for node in nodes_of(after, "Mul") if str(node.name).endswith("scaled")}
    assert {name for name in scaled if str(name).startswith("present")} == {
        "present.0.key.scaled",
        "present.0.value.scaled",
    }
    assert len(scaled) == 4
    (expected, floats), (found, coded_ones) = (_run(made, np.ones((2, 9), np.int64), 2) for made in (before, after))
    assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected)
    for name in ("present.0.key.shown", "present.0.value.shown"):
        np.testing.assert_allclose(coded_ones[name], floats[name], atol=0.02 * np.abs(floats[name]).max())


def test_queries_and_results_that_the_graph_shows_are_those_of_floats() -> None:
    """Scales beside these would be in what is shown: the caches are multiplied in their stead."""
    model = tiny_decoder(kv_cache=True, outliers=False)
    Prepare().call(Region.whole(model))
    first, second = (own for own in written(model.graph) if isinstance(own, Written))
    shown = ir.node("Neg", [second.q], name="shown")
    made = shown.outputs[0]
    made.name, made.type, made.shape = "shown", second.q.type, second.q.shape
    model.graph.append(shown)
    model.graph.outputs.extend([first.result, made])
    before, after, _ = coded(model, fused=False)
    floats, coded_ones = (_run(made, np.ones((2, 9), np.int64), 2)[1] for made in (before, after))
    for name in (first.result.name, "shown"):
        np.testing.assert_allclose(coded_ones[name], floats[name], atol=0.03 * np.ptp(floats[name]))


@pytest.mark.parametrize("fused", [True, False])
def test_caches_that_several_layers_read_are_multiplied_by_their_scales(fused: bool) -> None:
    """A scale beside the queries or the result of one layer would miss the others. Each of their GroupQueryAttention
    appends the same to the cache, which all of them must take for codes.
    """
    graph = Graph()
    decoders.Written(layers=4, shared=True).build(graph)
    before, after, own = coded(ir.from_proto(graph.model()), fused=fused)
    assert [decision.action for decision in own.decisions] == ["coded"] * 4
    assert len(nodes_of(after, "GroupQueryAttention")) == (4 if fused else 0)
    expected, found = (_run(made, np.ones((2, 9), np.int64), 2)[0] for made in (before, after))
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_what_no_calibration_reached_is_refused() -> None:
    model = tiny_decoder(kv_cache=True, outliers=False)
    Prepare().call(Region.whole(model))
    own = Kv()
    own.observed(model)
    fused, _ = fuse_attention(tiny_decoder(kv_cache=True, outliers=False))
    with pytest.raises(UserError, match=r"cache present\.0\.key was never seen on the calibration data"):
        own.call(Region.whole(fused))
