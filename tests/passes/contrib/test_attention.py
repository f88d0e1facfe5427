"""Pass fuse_attention: the same numbers as the attention that it replaces, whatever is padded and however it is run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Decision, Region
from qcompile.passes.contrib.attention import FuseAttention
from qcompile.passes.prepare import Prepare
from qcompile.runtime.sessions import session

Array = npt.NDArray[Any]
_VOCABULARY = 256


def _fused(model: ir.Model, **parameters: Any) -> tuple[ir.Model, list[Decision]]:
    """The model with its attention fused, and what was decided."""
    made = model.clone()
    Prepare().call(Region.whole(made))
    own = FuseAttention(**parameters)
    own.call(Region.whole(made))
    return made, own.decisions


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


class _Running:
    """A decoder in ONNX Runtime, and the caches of the sequences it has seen."""

    def __init__(self, model: ir.Model, batch: int) -> None:
        self.own = session(ir.to_proto(model).SerializeToString())
        self.caches: dict[str, Array] = {}
        for value in self.own.get_inputs():
            if value.name.startswith("past"):
                kind = np.float16 if "16" in value.type else np.float32
                self.caches[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), kind)

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.caches}
        names = [value.name for value in self.own.get_outputs()]
        taken = {value.name for value in self.own.get_inputs()}
        found = dict(zip(names, self.own.run(None, {n: a for n, a in feeds.items() if n in taken}), strict=True))
        self.caches = {name: found[name.replace("past_key_values", "present")] for name in self.caches}
        return np.asarray(found["logits"])


def _logits(model: ir.Model, mask: Array, rows: list[int], seed: int) -> Array:
    """Of the tokens that are no padding: a prompt, padded as `mask` says, and so many rows behind it, run by run."""
    random, batch = np.random.default_rng(seed), len(mask)
    run = _Running(model, batch)
    ids = random.integers(0, _VOCABULARY, mask.shape)
    found = [run(ids, mask, np.maximum(np.cumsum(mask, 1) - 1, 0))[mask == 1]]
    for count in rows:
        mask = np.concatenate([mask, np.ones((batch, count), np.int64)], 1)
        ids = random.integers(0, _VOCABULARY, (batch, count))
        positions = (np.cumsum(mask, 1) - 1)[:, -count:]
        found.append(run(ids, mask, positions).reshape(batch * count, -1))
    return np.concatenate(found)


def _check_same(model: ir.Model, fused: ir.Model, mask: Array, rows: list[int], *, tolerance: float = 1e-5) -> None:
    expected, found = (_logits(own, mask, rows, seed=3) for own in (model, fused))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def _grouped() -> ir.Model:
    return tiny_decoder(kv_cache=True, outliers=False)


def _one_head_each() -> ir.Model:
    return tiny_decoder(kv_cache=True, kv_heads=4, outliers=False)


def _of_one_cache_head() -> ir.Model:
    return tiny_decoder(kv_cache=True, kv_heads=1, outliers=False, norm="layer")


_KINDS: dict[str, Callable[[], ir.Model]] = {
    "grouped": _grouped,
    "one head each": _one_head_each,
    "one cache head": _of_one_cache_head,
}


@pytest.fixture(scope="module", params=_KINDS)
def both(request: pytest.FixtureRequest) -> tuple[ir.Model, ir.Model]:
    """A decoder, and the same with its attention fused."""
    model = _KINDS[request.param]()
    fused, _ = _fused(model)
    assert len(_nodes(fused, "GroupQueryAttention")) == 2
    assert not _nodes(fused, "Softmax")
    return model, fused


@settings(max_examples=15, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 9))
def test_sequences_of_a_batch_may_be_padded_on_either_side(
    both: tuple[ir.Model, ir.Model], data: st.DataObject, tokens: int
) -> None:
    """On the left, on the right, both; then token by token. The first token of each sequence is never padding alone."""
    batch = data.draw(st.integers(1, 3))
    mask = np.ones((batch, tokens), np.int64)
    for row in mask:
        left = data.draw(st.integers(0, tokens - 1))
        right = data.draw(st.integers(0, tokens - 1 - left))
        row[:left], row[tokens - right :] = 0, 0
    _check_same(*both, mask, [1, 1, 1])


def test_one_sequence_may_go_on_by_several_rows(both: tuple[ir.Model, ir.Model]) -> None:
    _check_same(*both, np.ones((1, 5), np.int64), [3, 1, 4])


def test_caches_hold_the_same(both: tuple[ir.Model, ir.Model]) -> None:
    runs = [_Running(model, 2) for model in both]
    for run in runs:
        run(np.arange(10).reshape(2, 5), np.ones((2, 5), np.int64), np.tile(np.arange(5), (2, 1)))
    for name, cache in runs[0].caches.items():
        np.testing.assert_allclose(runs[1].caches[name], cache, atol=1e-5, err_msg=name)


def test_any_position_ids_of_one_sequence_count(both: tuple[ir.Model, ir.Model]) -> None:
    """A cache from which old positions were dropped, say: positions go on beyond its length."""
    found = []
    for model in both:
        run = _Running(model, 1)
        run(np.arange(6)[None], np.ones((1, 6), np.int64), np.arange(6)[None])
        run.caches = {name: cache[:, :, -4:] for name, cache in run.caches.items()}
        found.append(run(np.array([[7]]), np.ones((1, 5), np.int64), np.array([[6]])))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_half_precision_stays_half_precision() -> None:
    model = tiny_decoder(kv_cache=True, dtype="fp16", outliers=False)
    fused, _ = _fused(model)
    assert len(_nodes(fused, "GroupQueryAttention")) == 2
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    _check_same(model, fused, mask, [1, 1], tolerance=2e-2)


def test_norms_take_the_sum_before_them_along() -> None:
    fused, decisions = _fused(_grouped())
    assert len(_nodes(fused, "SkipSimplifiedLayerNormalization")) == 4
    assert len(_nodes(fused, "SimplifiedLayerNormalization")) == 1
    assert not _nodes(fused, "ReduceMean")
    assert {decision.action for decision in decisions} == {"fused"}


def test_without_padding_no_mask_is_read() -> None:
    """The contract of onnxruntime-genai: the sum of attention_mask says where a sequence ends."""
    model = _grouped()
    fused, _ = _fused(model, padding=False)
    assert all(len(node.inputs) == 9 for node in _nodes(fused, "GroupQueryAttention"))
    _check_same(model, fused, np.ones((2, 6), np.int64), [1, 1])


def test_decoders_without_caches_stay() -> None:
    model = tiny_decoder()
    fused, decisions = _fused(model)
    assert not _nodes(fused, "GroupQueryAttention")
    assert _nodes(fused, "ReduceMean")
    assert decisions == []


def _without(model: ir.Model, op_type: str, replacement: str) -> ir.Model:
    for node in _nodes(model, op_type):
        node.op_type = replacement
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: _without(model, "LessOrEqual", "GreaterOrEqual"), "its mask is neither causal nor a window"),
        (lambda model: _without(model, "Cos", "Sin"), "no rotation by cosines and sines is found before its scores"),
        (lambda model: _without(model, "Neg", "Identity"), "it is turned in none of the two usual ways"),
    ],
)
def test_what_is_no_such_attention_stays_with_its_reason(change: Callable[[ir.Model], ir.Model], reason: str) -> None:
    model = change(_grouped())
    fused, decisions = _fused(model)
    assert not _nodes(fused, "GroupQueryAttention")
    assert [decision.reason for decision in decisions if decision.action == "kept"] == [reason] * 2
    _check_same(model, fused, np.ones((2, 6), np.int64), [1])
