"""runtime/caches.py: any split of sequences into runs gives what copying the caches out and in gives, bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from graphs.genai import _decoder
from graphs.table import Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.data.feeds import complete, token_feeds
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.facts.value_types import told_by_runtime
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.contrib.attention import FuseAttention
from qcompile.passes.errors import UserError
from qcompile.passes.prepare import Prepare
from qcompile.runtime import caches
from qcompile.runtime.caches import Decoder
from qcompile.runtime.sessions import ort_value, run, session

Array = npt.NDArray[Any]


def _fused(*, padding: bool = True, window: int = 0, **settings: Any) -> ir.Model:
    model = tiny_decoder(kv_cache=True, outliers=False, **settings)
    Prepare().call(Region.whole(model))
    FuseAttention(padding=padding).call(Region.whole(model))
    for node in _attentions(model):
        if window:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
    return model


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def _of_the_builder(dtype: Any, *, packed: bool) -> ir.Model:
    make = Graph()
    make.dtype = dtype
    _decoder(make, packed=packed)
    model = ir.from_proto(make.model())
    Prepare().call(Region.whole(model, told_by_runtime))
    return model


KINDS: dict[str, Callable[[], ir.Model]] = {
    "fused": _fused,
    "half": lambda: _fused(dtype="fp16"),
    "without padding": lambda: _fused(padding=False),
    "a window": lambda: _fused(window=5),
    "a window, half": lambda: _fused(window=3, dtype="fp16", padding=False),
    "one cache head": lambda: _fused(kv_heads=1),
    "genai's builder": lambda: _of_the_builder(np.float32, packed=False),
    "genai's builder, packed, half": lambda: _of_the_builder(np.float16, packed=True),
}


class Case:
    """A decoder, the roles of its inputs, a session of it."""

    def __init__(self, model: ir.Model) -> None:
        self.plan: InputPlan = input_plan(model)
        self.session = session(ir.to_proto(model).SerializeToString())

    def decoder(self, *, shared: bool, room: int = 0) -> Decoder:
        return Decoder(self.session, replace(self.plan.caches, shared=shared), ["logits"], room=room)

    def feeds(self, ids: Array, done: int) -> dict[str, Array]:
        return token_feeds(self.plan, ids, past=done, empty=not done)

    def copied(self) -> Callable[[dict[str, Array]], Array]:
        """Logits of feeds, caches copied out of each run and into the next."""
        names = ["logits", *(pair.present for pair in self.plan.past)]
        before: dict[str, Array] = {}

        def step(feeds: dict[str, Array]) -> Array:
            found = run(self.session, names, complete(self.plan, feeds, before) if before else feeds)
            before.update(zip(names, found, strict=True))
            return found[0]

        return step


@pytest.fixture(scope="module", params=KINDS)
def fused(request: pytest.FixtureRequest) -> Case:
    case = Case(KINDS[request.param]())
    assert case.plan.caches.shared
    assert case.plan.caches.tokens == "input_ids"
    return case


def _runs(rows: Sequence[int], batch: int) -> Iterator[tuple[Array, int]]:
    """(ids, how many were before) of runs over so many rows each."""
    random, done = np.random.default_rng(1), 0
    for count in rows:
        yield random.integers(0, 96, (batch, count)), done
        done += count


def _check_same(case: Case, rows: Sequence[int], batch: int = 1, room: int = 0) -> None:
    copied = case.copied()
    decoders = [case.decoder(shared=shared, room=room) for shared in (True, False)]
    for ids, done in _runs(rows, batch):
        feeds = case.feeds(ids, done)
        wanted = copied(feeds)
        for decoder in decoders:
            (found,) = decoder.run(feeds)
            np.testing.assert_array_equal(found, wanted, err_msg=f"{ids.shape} behind {done}")


@settings(max_examples=12, deadline=None)
@given(rows=st.lists(st.integers(1, 6), min_size=1, max_size=10), room=st.integers(0, 20))
def test_any_split_of_one_sequence(fused: Case, rows: list[int], room: int) -> None:
    """With no room to spare at first, it is crossed several times."""
    _check_same(fused, rows, room=room)


@settings(max_examples=6, deadline=None)
@given(batch=st.integers(2, 4), prompt=st.integers(1, 9), steps=st.integers(0, 12), room=st.integers(0, 20))
def test_several_sequences_go_on_token_by_token(fused: Case, batch: int, prompt: int, steps: int, room: int) -> None:
    """ONNX Runtime takes several rows behind cached ones for one sequence only."""
    _check_same(fused, [prompt, *[1] * steps], batch, room)


def test_a_sequence_may_begin_with_caches_of_its_own(fused: Case) -> None:
    names = [pair.present for pair in fused.plan.past]
    first, second = (ids for ids, _ in _runs([5, 3], 1))
    known = dict(zip(names, run(fused.session, names, fused.feeds(first, 0)), strict=True))
    feeds = complete(fused.plan, fused.feeds(second, 5), known)
    wanted = run(fused.session, ["logits"], feeds)[0]
    for shared in (True, False):
        np.testing.assert_array_equal(fused.decoder(shared=shared).run(feeds)[0], wanted)


@pytest.mark.parametrize(("room", "lengths"), [(0, [3, 6, 12, 24]), (5, [5, 10, 20]), (20, [20])])
def test_room_is_doubled_where_it_does_not_suffice(
    fused: Case, monkeypatch: pytest.MonkeyPatch, room: int, lengths: list[int]
) -> None:
    made: list[int] = []

    def value(array: Array, device: str) -> Any:
        made.append(array.shape[2])
        return ort_value(array, device)

    monkeypatch.setattr(caches, "ort_value", value)
    decoder = fused.decoder(shared=True, room=room)
    for ids, done in _runs([3, *[1] * 17], 1):
        decoder.run(fused.feeds(ids, done))
    assert made == [length for length in lengths for _ in fused.plan.past]


def test_what_was_given_stays_as_it_was(fused: Case) -> None:
    """Neither logits of a run before, nor the arrays that a run was fed, are written over."""
    for shared in (True, False):
        decoder, kept = fused.decoder(shared=shared), []
        for ids, done in _runs([4, 1, 1], 1):
            feeds = fused.feeds(ids, done)
            (found,) = decoder.run(feeds)
            kept.append((found, found.copy(), feeds, {name: array.copy() for name, array in feeds.items()}))
        for found, copy, feeds, copies in kept:
            np.testing.assert_array_equal(found, copy)
            for name, array in feeds.items():
                np.testing.assert_array_equal(array, copies[name])


# --- which caches may be shared ---------------------------------------------------------------------------------------


def _read_past(model: ir.Model) -> None:
    """Something else reads a cache."""
    _append_output(model, "Shape", next(value for value in model.graph.inputs if value.name.startswith("past")))


def _read_present(model: ir.Model) -> None:
    _append_output(model, "Shape", _attentions(model)[0].outputs[1])


def _past_as_output(model: ir.Model) -> None:
    model.graph.outputs.append(next(value for value in model.graph.inputs if value.name.startswith("past")))


def _other_present(model: ir.Model) -> None:
    """A cache reaches its output through another operator."""
    (value,) = (value for value in model.graph.outputs if value.name == "present.1.value")
    node = ir.node("Cast", [value], {"to": value.dtype})
    node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
    model.graph.append(node)
    model.graph.outputs[list(model.graph.outputs).index(value)] = node.outputs[0]
    value.name, node.outputs[0].name = "inner", "present.1.value"


def _without_mask(model: ir.Model) -> None:
    """The lengths come from the caches' shape, as they do where there is no attention_mask."""
    past = next(value for value in model.graph.inputs if value.name.startswith("past"))
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    two = [ir.node("Shape", [past], {"start": 2, "end": 3}), ir.node("Shape", [ids], {"start": 1, "end": 2})]
    total = ir.node("Add", [node.outputs[0] for node in two])
    batch = ir.node("Shape", [ids], {"start": 0, "end": 1})
    shape = ir.node("Concat", [batch.outputs[0], total.outputs[0]], {"axis": 0})
    one = {"value": ir.tensor(np.ones(1, np.int64))}
    made = ir.node("ConstantOfShape", [shape.outputs[0]], one)
    made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.INT64, mask.shape
    for use in tuple(mask.uses()):
        use.node.replace_input_with(use.idx, made.outputs[0])
    next(iter(model.graph)).prepend([*two, total, batch, shape, made])
    model.graph.inputs.remove(mask)


def _append_output(model: ir.Model, op_type: str, value: ir.Value) -> None:
    node = ir.node(op_type, [value])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "more", ir.DataType.INT64, ir.Shape([4])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


@pytest.mark.parametrize("change", [_read_past, _read_present, _past_as_output, _other_present, _without_mask])
def test_caches_that_more_than_attention_reads_are_handed_over(change: Callable[[ir.Model], None]) -> None:
    model = _fused(padding=False)
    change(model)
    case = Case(model)
    assert len(case.plan.past) == 4
    assert not case.plan.caches.shared
    copied, decoder = case.copied(), Decoder(case.session, case.plan.caches, ["logits"])
    for ids, done in _runs([3, 1, 2], 1):
        np.testing.assert_array_equal(decoder.run(case.feeds(ids, done))[0], copied(case.feeds(ids, done)))


def test_exported_caches_are_handed_over() -> None:
    case = Case(tiny_decoder(kv_cache=True))
    assert not case.plan.caches.shared
    copied, decoder = case.copied(), case.decoder(shared=False)
    for ids, done in _runs([3, 1, 2], 2):
        np.testing.assert_array_equal(decoder.run(case.feeds(ids, done))[0], copied(case.feeds(ids, done)))


def test_what_onnx_runtime_refuses_is_told_in_one_line(fused: Case) -> None:
    decoder = fused.decoder(shared=True)
    for ids, done in _runs([3, 1], 2):
        decoder.run(fused.feeds(ids, done))
    with pytest.raises(UserError, match=r"ONNX Runtime failed on inputs .*out of data bounds"):
        decoder.run(fused.feeds(np.full((2, 1), 10**6), 4))
