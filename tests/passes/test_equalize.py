"""equalize: channels between convolutions are rescaled exactly, all that are tied alike, and INT8 gains by it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import opened

from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.equalize import Equalize, Noise, factor_of, importance
from qcompile.passes.observers.extents import Extents
from qcompile.passes.tied import Tied, by_inputs, find_tied, is_depthwise, rescale
from qcompile.runtime.sessions import run, session

C = 8
SIDE = 6


def _weight(b: Builder, rng: np.random.Generator, name: str, *shape: int) -> ir.Value:
    return b.weight(name, (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))


def _network(middle: list[str], *, spread: float = 0.0, bias: bool = True, seed: int = 0) -> ir.Model:
    """image → Conv → the operators of `middle` → Conv → y; spread: natural logarithms of what the channels between the
    two reach, which the second one undoes.
    """
    b, rng = Builder(opset=21), np.random.default_rng(seed)
    loud = np.exp(spread * rng.standard_normal(C)).astype(np.float32)[:, None, None, None]
    x = b.input("image", b.dtype, ["n", 3, SIDE, SIDE])
    first = b.weight("first", rng.standard_normal((C, 3, 3, 3)).astype(np.float32) * loud)
    biases = [b.weight("first.bias", rng.standard_normal(C).astype(np.float32) * loud[:, 0, 0, 0])] if bias else []
    x = b.Conv(x, first, *biases, pads=[1] * 4, name="conv_first")
    for number, kind in enumerate(middle):
        name = f"{kind}_{number}"
        if kind == "depthwise":
            x = b.Conv(x, _weight(b, rng, name, C, 1, 3, 3), group=C, pads=[1] * 4, name=name)
        elif kind == "grouped":
            x = b.Conv(x, _weight(b, rng, name, C, C // 2, 1, 1), group=2, name=name)
        elif kind == "up":
            x = b.ConvTranspose(x, _weight(b, rng, name, C, C, 2, 2), strides=[2, 2], name=name)
        elif kind == "residual":
            inner = b.Conv(b.Relu(x), _weight(b, rng, name, C, C, 1, 1), name=name)
            x = b.Add(x, inner, name=f"{name}.sum")
        elif kind in ("MaxPool", "AveragePool"):
            x = b.node(kind, x, name=name, kernel_shape=[2, 2])[0]
        else:
            x = b.node(kind, x, name=name)[0]
    last = rng.standard_normal((4, C, 1, 1)).astype(np.float32) / np.swapaxes(loud, 0, 1)
    return b.model({"y": b.Conv(x, b.weight("last", last), name="conv_last")})


def _images(rows: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, 3, SIDE, SIDE)).astype(np.float32)


def _groups(model: ir.Model) -> list[Tied]:
    return [tied for tied in find_tied(model.graph) if isinstance(tied, Tied)]


def _run(model: ir.Model, values: list[str], images: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    for name in values:
        if name not in known:
            proto.graph.output.add().name = name
    return opened(proto.SerializeToString()).run(values, {"image": images})


KINDS = ["Relu", "LeakyRelu", "depthwise", "grouped", "up", "residual", "MaxPool", "AveragePool", "Identity"]


@given(st.lists(st.sampled_from(KINDS), max_size=4), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_factors_divide_the_values_and_nothing_else(middle: list[str], bias: bool, seed: int) -> None:
    model, images = _network(middle, bias=bias, seed=seed), _images(2)
    groups, rng = _groups(model), np.random.default_rng(seed)
    names = [str(value.name) for tied in groups for value in tied.values]
    before = _run(model, ["y", *names], images)
    factors: dict[str, npt.NDArray[np.float64]] = {}
    for tied in groups:
        factor = np.exp(rng.uniform(-3, 3, tied.channels))
        factors.update((str(value.name), factor) for value in tied.values)
        rescale(tied, factor)
    assert groups, "what stands between two convolutions is one group at least"
    for name, old, new in zip(["y", *names], before, _run(model, ["y", *names], images), strict=True):
        wanted = old / factors[name][:, None, None] if name in factors else old
        assert np.linalg.norm(new - wanted) <= 2e-5 * np.linalg.norm(wanted) + 1e-30, name


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Sigmoid", "also read by Sigmoid"),
        ("HardSwish", "also read by HardSwish"),
        ("output", "is an output of the graph"),
        ("constant", "also read by Add"),
        ("shared", "is read elsewhere, too"),
    ],
)
def test_channels_that_others_see_are_left_with_the_reason(kind: str, why: str) -> None:
    b, rng = Builder(opset=22), np.random.default_rng(0)
    first, last = _weight(b, rng, "first", C, 3, 1, 1), _weight(b, rng, "last", 4, C, 1, 1)
    x = b.input("image", b.dtype, ["n", 3, SIDE, SIDE])
    made = b.Conv(x, first, name="a")
    outputs = {"y": made} if kind == "output" else {}
    if kind == "shared":
        outputs["z"] = b.Conv(x, first, name="again")
    elif kind == "constant":
        made = b.Add(made, b.weight("c", np.ones((C, 1, 1), np.float32)), name="plus")
    elif kind != "output":
        made = b.node(kind, made, name="curved")[0]
    model = b.model({"out": b.Conv(made, last, name="b")} | outputs)
    found = find_tied(model.graph)
    assert not [own for own in found if isinstance(own, Tied)]
    assert any(why in own[1] for own in found if not isinstance(own, Tied))


def test_extents_of_batches_against_their_formulas() -> None:
    model, images = _network(["Relu"]), _images(6)
    (value,) = [value for value in _groups(model)[0].values if str(value.producer().op_type) == "Relu"]  # type: ignore[union-attr]
    own = Extents(str(value.name))
    proto = ir.to_proto(model)
    own.append(proto.graph)
    running = opened(proto.SerializeToString())
    names = [output.name for output in running.get_outputs()]
    for start in (0, 2, 4):
        own.update(dict(zip(names, running.run(names, {"image": images[start : start + 2]}), strict=True)))
    (x,) = _run(model, [str(value.name)], images)
    by_batch = x.reshape(3, 2, C, -1)
    np.testing.assert_allclose(own.high, np.maximum(by_batch.max(axis=(1, 3)), 0), rtol=1e-6)
    np.testing.assert_allclose(own.low, np.minimum(by_batch.min(axis=(1, 3)), 0), rtol=1e-6)
    np.testing.assert_allclose(own.power, np.square(by_batch).mean(axis=(1, 3)), rtol=1e-5)
    again = Extents(str(value.name))
    again.restore(own.state())
    np.testing.assert_array_equal(again.power, own.power)


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=9), st.sampled_from([0.25, 0.5, 1.0]))
def test_factors_are_at_most_one_and_even_out_ranges(reach: list[float], alpha: float) -> None:
    wide = np.array(reach, np.float64)
    factor = factor_of(wide, alpha)
    assert np.isfinite(factor).all()
    assert ((factor > 0) & (factor <= 1)).all()
    assert (factor[wide == 0] == 1).all()
    assert (wide / factor).max(initial=0) == pytest.approx(wide.max(initial=0))


def _seen(model: ir.Model, tied: Tied, images: npt.NDArray[np.float32], batches: int) -> list[Extents]:
    found = [Extents(str(value.name)) for value in tied.rounded]
    for own, x in zip(found, _run(model, [own.value for own in found], images), strict=True):
        parts = x.reshape(batches, -1, *x.shape[1:])
        low, high = np.minimum(parts.min(axis=(1, 3, 4)), 0), np.maximum(parts.max(axis=(1, 3, 4)), 0)
        own.restore({"rows": np.stack([low, high, np.square(parts).mean(axis=(1, 3, 4))], axis=1)})
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_noise_is_that_of_rounding_what_is_read_and_the_weights_it_meets(alpha: float) -> None:
    """Of one number of the readers' outputs, summed over their channels, against rounded numbers."""
    model, images = _network(["Relu"], spread=1.5), _images(256)
    (tied,) = _groups(model)
    noise = Noise(tied, importance([tied])[tied], _seen(model, tied, images, 8))
    factor = factor_of(noise.reach(np.ones(8, bool)), alpha) if alpha else np.ones(C)
    (x,) = _run(model, [str(tied.rounded[0].name)], images)
    x = np.moveaxis(x, 1, -1).reshape(-1, C).astype(np.float64)
    w = by_inputs(tied.readers[0])[0, :, :, 0].astype(np.float64).T
    scaled, by = x / factor, w * factor[:, None]
    step, steps = scaled.max() / 255, np.abs(by).max(axis=0) / 127
    some = scaled[(scaled > 0).all(axis=1)] if (scaled > 0).all(axis=1).sum() > 99 else scaled
    dithered = np.random.default_rng(0).uniform(-0.5, 0.5, (len(some), C)) * step
    measured = np.square(dithered @ by).sum(axis=1).mean()
    errors = np.random.default_rng(1).uniform(-0.5, 0.5, (400, *by.shape)) * steps
    measured += np.mean([np.square(scaled @ own).sum(axis=1).mean() for own in errors])
    assert noise.of(factor) == pytest.approx(measured, rel=0.1)


def test_depthwise_readers_count_by_what_is_behind_them() -> None:
    model = _network(["Relu", "depthwise", "Relu"])
    first, second = _groups(model)
    found = importance([first, second])
    last = by_inputs(second.readers[0])
    np.testing.assert_allclose(found[second], np.square(last).sum(axis=(0, 1, 3)), rtol=1e-5)
    (depthwise,) = first.readers
    assert is_depthwise(depthwise)
    squares = np.square(by_inputs(depthwise)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found[first], squares * found[second], rtol=1e-5)


def _files(folder: Path, batches: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.npz" for number in range(batches)]
    for number, path in enumerate(paths):
        np.savez(path, image=_images(8, seed=100 + number))
    return [str(path) for path in paths]


def _sqnr(bench: Any, source: Path, passes: str, batches: int) -> tuple[float, Any]:
    """dB on images that calibration has not seen, and the report."""
    report = bench.compile(source, passes, calibration=_files(bench.folder / f"d{batches}", batches))
    feeds = {"image": _images(64, seed=7)}
    wanted, found = (
        run(session(path, kernels="portable"), ["y"], feeds)[0].astype(np.float64)
        for path in (source, bench.folder / "out/model.onnx")
    )
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2))), report


@pytest.mark.parametrize(
    ("middle", "least"), [(["Relu"], 3), (["Relu", "depthwise", "Relu"], 3), (["residual", "Relu"], 0.5)]
)
def test_int8_gains_where_channels_differ(bench: Any, middle: list[str], least: float) -> None:
    source = bench.save(_network(middle, spread=2.0), tokenizer=False)
    (plain, _), (equal, report) = (_sqnr(bench, source, passes, 8) for passes in ("qdq", "equalize,qdq"))
    assert equal > plain + least
    assert any(own.action == "folded" for own in report.decisions["equalize"])


def test_even_channels_lose_nothing(bench: Any) -> None:
    source = bench.save(_network(["Relu", "depthwise", "Relu"]), tokenizer=False)
    (plain, _), (equal, report) = (_sqnr(bench, source, passes, 8) for passes in ("qdq", "equalize,qdq"))
    assert equal > plain - 0.5
    folded = [own.detail["relative_loss"] for own in report.decisions["equalize"] if own.action == "folded"]
    assert all(left < 0.9 for left in folded)


def test_too_few_batches_judge_nothing(bench: Any) -> None:
    source = bench.save(_network(["Relu"], spread=2.0), tokenizer=False)
    _, report = _sqnr(bench, source, "equalize,qdq", 2)
    assert any("too few to hold some aside" in own.reason for own in report.decisions["equalize"])
    assert not any(own.action == "folded" for own in report.decisions["equalize"])


def test_without_observations_nothing_is_rescaled() -> None:
    model = _network(["Relu"], spread=2.0)
    made = Equalize()
    made.call(Region.whole(model))
    assert "its channels were not observed" in {own.reason for own in made.decisions}
    assert not any(own.action == "folded" for own in made.decisions)
