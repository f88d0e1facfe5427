"""compiler/walk/runner.py: segment by segment gives what the whole model gives, and statistics are those of numpy."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.data.feeds import Batch, complete, input_plan, token_batches
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.walk import extract
from qcompile.compiler.walk.runner import Runner, Stream, went_on
from qcompile.compiler.walk.segments import Segment, split
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.statistics import Statistics
from qcompile.runtime.bench import native_kernel
from qcompile.runtime.sessions import run, session

WINDOWS = list(np.random.default_rng(0).integers(0, 256, size=(3, 14)))


def _segments(model: ir.Model) -> list[Segment]:
    return split(model, {linear.node for linear in find_linears(model.graph)}.__contains__)


def _activations(nodes: Any) -> list[ir.Value]:
    return list(dict.fromkeys(linear.activation for linear in find_linears(nodes)))


def _groups(segment: Segment) -> list[list[ir.Value]]:
    return [[value] for value in _activations(segment.nodes)]


def _whole(model: ir.Model, batches: list[Batch], extra: list[ir.Value] | None = None) -> list[Arrays]:
    """Every output of the model, and the extra values, run as one graph."""
    proto, plan = ir.to_proto(model), input_plan(model)
    proto.graph.output.extend(ir.serde.serialize_value(value) for value in extra or [])
    running, names = session(proto.SerializeToString(), kernels="portable"), [o.name for o in proto.graph.output]
    results: list[Arrays] = []
    for batch in batches:
        feeds = batch.feeds if batch.follows is None else complete(plan, batch.feeds, results[batch.follows])
        results.append(dict(zip(names, run(running, names, feeds), strict=True)))
    return results


def _damage(segment: Segment) -> None:
    """A visible change to every weight of a segment, in the place of its quantization."""
    rng = np.random.default_rng(1)
    for linear in find_linears(segment.nodes):
        w = linear.weight.const_value.numpy()
        noise = 1 + 0.2 * rng.standard_normal(w.shape)
        linear.weight.const_value = ir.tensor((w * noise).astype(w.dtype), name=linear.weight.name)


def _walk(model: ir.Model, batches: list[Batch]) -> tuple[dict[ir.Value, Statistics], list[Arrays]]:
    """Statistics of every linear's input, and all outputs, with nothing rewritten."""
    runner, stream, checks = Runner(model, input_plan(model)), Stream(batches), Stream(batches)
    found: dict[ir.Value, Statistics] = {}
    outputs: list[Arrays] = [{} for _ in batches]
    for segment in _segments(model):
        found |= runner.collect(segment, _groups(segment), stream)
        runner.advance(segment, stream)
        given = runner.outputs(segment, checks, original=True)
        checks.original = went_on(segment, checks.original, given)
        for kept, arrays in zip(outputs, given, strict=True):
            kept.update(arrays)
    return found, outputs


def _in_pieces(length: int = 4) -> ir.Model:
    """A decoder with caches that takes exactly so many tokens at a time."""
    model = tiny_decoder(kv_cache=True)
    (ids,) = (value for value in model.graph.inputs if value.name == "input_ids")
    ids.shape = ir.Shape(["batch", length])
    return model


@pytest.mark.parametrize("kind", ["rms", "skip", "cache", "pieces", "encoder"])
def test_segments_give_what_the_whole_model_gives(kind: str) -> None:
    model = {
        "rms": lambda: tiny_decoder(),
        "skip": lambda: tiny_decoder(norm="skip"),
        "cache": lambda: tiny_decoder(kv_cache=True),
        "pieces": _in_pieces,
        "encoder": lambda: tiny_encoder(),
    }[kind]()
    batches = token_batches(input_plan(model), WINDOWS, decode_step=kind == "cache")
    assert any(batch.follows is not None for batch in batches) == (kind in ("cache", "pieces"))
    activations = _activations(model.graph)
    expected = _whole(model, batches, activations)
    found, outputs = _walk(model, batches)
    for given, wanted in zip(outputs, expected, strict=True):
        for value in model.graph.outputs:
            name = str(value.name)
            scale = np.abs(wanted[name]).max()
            np.testing.assert_allclose(given[name], wanted[name], rtol=0, atol=1e-6 * scale)
    assert set(found) == set(activations)
    for value in activations:
        _check(found[value], np.concatenate([_rows(arrays, value) for arrays in expected]))


def _rows(arrays: Arrays, value: ir.Value) -> Any:
    array = arrays[str(value.name)].astype(np.float64)
    return array.reshape(-1, array.shape[-1])


def _check(statistics: Statistics, x: Any) -> None:
    assert statistics.rows == len(x)
    np.testing.assert_allclose(statistics.absmax, np.abs(x).max(axis=0), rtol=1e-5, atol=1e-5)
    exact = x.T @ x
    np.testing.assert_allclose(statistics.gram, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_later_segments_see_what_the_rewritten_ones_give() -> None:
    """gram = XᵀX with X of the changed model, run as a whole graph."""
    model, original = tiny_decoder(tied=False), tiny_decoder(tied=False)
    batches = token_batches(input_plan(model), WINDOWS)
    runner, stream = Runner(model, input_plan(model)), Stream(batches)
    first, second, *_ = _segments(model)
    _damage(first)
    runner.advance(first, stream)
    after = runner.collect(second, _groups(second), stream)
    names = {str(value.name) for value in after}
    twins = [value for node in original.graph for value in node.outputs if value.name in names]
    changed, plain = _whole(model, batches, list(after)), _whole(original, batches, twins)
    for value, statistics in after.items():
        x, x0 = (np.concatenate([_rows(arrays, value) for arrays in results]) for results in (changed, plain))
        assert np.linalg.norm(x - x0) > 0.05 * np.linalg.norm(x0), "the damage is felt here"
        _check(statistics, x)


def test_a_decode_step_reads_the_caches_of_the_rewritten_graph() -> None:
    model = tiny_decoder(kv_cache=True, tied=False)
    batches = token_batches(input_plan(model), WINDOWS, decode_step=True)
    runner, stream = Runner(model, input_plan(model)), Stream(batches)
    found: dict[ir.Value, Statistics] = {}
    for segment in _segments(model):
        if segment.carried:  # what the changed first segment gives
            found |= runner.collect(segment, _groups(segment), stream)
        else:
            runner.collect(segment, _groups(segment), stream)
            _damage(segment)
        runner.advance(segment, stream)
    expected = _whole(model, batches, list(found))
    for value, statistics in found.items():
        _check(statistics, np.concatenate([_rows(arrays, value) for arrays in expected]))


def test_an_activation_that_overflows_is_named() -> None:
    model = tiny_decoder(tied=False)
    norm = model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    norm.const_value = ir.tensor(np.full(64, 3e38, np.float32), name=norm.name)
    with pytest.raises(UserError, match=r"activation model.layers.1.post_attention_layernorm.out is NaN or infinite"):
        _walk(model, token_batches(input_plan(model), WINDOWS))


def test_progress_counts_the_tokens_of_every_run() -> None:
    model, seen = tiny_decoder(), []
    batches = token_batches(input_plan(model), WINDOWS)
    runner, stream = Runner(model, input_plan(model), progress=seen.append), Stream(batches)
    first, *_ = _segments(model)
    runner.collect(first, _groups(first), stream)
    assert seen == [14, 14, 14]


def test_a_cache_read_for_its_shape_before_it_is_made() -> None:
    """Exports take the mask's length from any layer's cache: the first segment then reads one of a later segment."""
    model = tiny_decoder(kv_cache=True)
    plan = input_plan(model)
    runner = Runner(model, plan)
    first, second = plan.past[0], plan.past[-1]
    made = np.ones((1, 2, 5, 16), np.float32)
    assert runner._past(first, {first.present: made}) is made
    stand_in = runner._past(second, {first.present: made})
    assert (stand_in.shape, stand_in.dtype, stand_in.any()) == (made.shape, made.dtype, False)


def test_what_outlives_a_run_is_not_in_onnxruntimes_arena() -> None:
    """A view of an output, however small, keeps all memory that its session ever took."""
    model = tiny_decoder(kv_cache=True)
    batches = token_batches(input_plan(model), WINDOWS, decode_step=True)
    runner, stream = Runner(model, input_plan(model)), Stream(batches)
    first, *_ = _segments(model)
    statistics = runner.collect(first, _groups(first), stream)
    runner.advance(first, stream)
    outputs = runner.outputs(first, Stream(batches), original=False)
    kept = [array for own in statistics.values() for array in (own.gram, own.absmax)]
    kept += [
        *(array for own in stream.quantized.values() for array in own),
        *(array for arrays in outputs for array in arrays.values()),
    ]
    assert len(kept) > 3 * len(batches)
    assert all(array.flags.owndata for array in kept)


def test_of_a_cache_that_was_read_only_the_shape_stays() -> None:
    model = tiny_decoder(kv_cache=True)
    batches = token_batches(input_plan(model), WINDOWS, decode_step=True)
    runner, stream = Runner(model, input_plan(model)), Stream(batches)
    for segment in _segments(model):
        runner.advance(segment, stream)
    assert set(stream.presents) == {0, 2, 4}
    for presents in stream.presents.values():
        assert {array.shape for array in presents.values()} == {(1, 2, 13, 16)}
        assert not any(stride for array in presents.values() for stride in array.strides)


def test_a_cache_that_another_segment_reads_stays() -> None:
    model = tiny_decoder(kv_cache=True)
    batches = token_batches(input_plan(model), WINDOWS, decode_step=True)
    runner, stream = Runner(model, input_plan(model)), Stream(batches)
    shared, other = runner.plan.past[:2]
    (value,) = (value for value in model.graph.inputs if value.name == shared.past.name)
    first, *_ = _segments(model)
    model.graph.append(ir.node("Abs", [value]))  # of no segment: any of them may use it
    runner.advance(first, stream)
    for presents in stream.presents.values():
        assert any(presents[shared.present].strides)
        assert not any(presents[other.present].strides)


def test_activations_from_the_disk_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder(kv_cache=True)
    batches = token_batches(input_plan(model), WINDOWS, decode_step=True)
    in_memory, _ = _walk(model, batches)
    monkeypatch.setattr("qcompile.compiler.walk.runner.BUDGET", 0)
    on_disk, _ = _walk(model, batches)
    for value, statistics in in_memory.items():
        assert on_disk[value].rows == statistics.rows
        assert on_disk[value].gram.tobytes() == statistics.gram.tobytes()
        assert on_disk[value].absmax.tobytes() == statistics.absmax.tobytes()


@pytest.mark.skipif(native_kernel() is None, reason="the library of native kernels is not built")
def test_calibration_goes_on_by_native_kernels_and_checks_by_bodies(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on differs from the bodies' numbers by rounding of 16 bits; nothing else is run by them."""
    opened, forced, errors = list[tuple[bool, str]](), list[str](), list[float]()
    advance, own = Runner.advance, extract.session

    def spied(*args: Any, kernels: str, **more: Any) -> Any:
        opened.append((bool(inside), kernels))
        return own(*args, kernels=(forced or [kernels])[0], **more)

    inside = list[Segment]()

    def both(self: Runner, segment: Segment, stream: Stream, *rest: Any) -> None:
        other = Stream(stream.batches, stream.quantized, presents={**stream.presents})
        inside.append(segment)
        forced.append("portable")
        advance(self, segment, other, *rest)
        forced.clear()
        advance(self, segment, stream, *rest)
        inside.clear()
        for name in (own for own in other.quantized if other.quantized[own][0].dtype.kind == "f"):
            for found, wanted in zip(stream.quantized[name], other.quantized[name], strict=True):
                errors.append(float(np.abs(found - wanted).max() / np.abs(wanted).max()))

    monkeypatch.setattr(extract, "session", spied)
    monkeypatch.setattr(Runner, "advance", both)
    bench.compile(bench.save(tiny_decoder(layers=2, kv_cache=True)), "smooth,pack")
    assert {kernels for advancing, kernels in opened if advancing} == {"auto"}
    assert {kernels for advancing, kernels in opened if not advancing} == {"portable"}
    assert 0 < max(errors) < 1e-3
