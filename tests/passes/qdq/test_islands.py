"""passes/qdq/islands.py: a spectrum at the beginning of a graph is left in float where its grid would be coarse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_graphs import Tiny
from qdq_runs import session

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.passes.observers.distribution import Distribution

BINS, WIDTH, HOP = 65, 128, 32
REASON = "eight bits tell its output coarsely"


def _basis() -> np.ndarray:
    """Windowed cosines and sines (2 * BINS, 1, WIDTH)."""
    phase = 2 * np.pi * np.outer(np.arange(BINS), np.arange(WIDTH)) / WIDTH
    return (np.concatenate([np.cos(phase), np.sin(phase)]) * np.hanning(WIDTH)).astype(np.float32)[:, None]


def _listener(*, spectrum: bool = True, before: tuple[str, ...] = ("Identity",), twice: bool = False) -> Tiny:
    """Sounds (b, 1, 512) to magnitudes of their spectra to two convolutions; without `spectrum` they read its parts."""
    tiny = Tiny()
    sound = tiny.input("b", 1, 512)
    for operator in before:
        sound = tiny.one(operator, sound)
    value = parts = tiny.one("Conv", sound, tiny.constant(_basis()), strides=[HOP])
    if spectrum:
        halves = tiny.op("Split", [parts], 2, axis=1, num_outputs=2)
        squares = [tiny.one("Mul", own, own) for own in halves]
        value = tiny.one("Sqrt", tiny.one("Add", *squares))
    channels = BINS if spectrum else 2 * BINS
    hidden = tiny.one("Relu", tiny.one("Conv", value, tiny.floats(16, channels, 3), tiny.floats(16)))
    if twice:
        tiny.output(tiny.one("Conv", sound, tiny.floats(4, 1, 5)))
    return tiny.output(tiny.one("Conv", hidden, tiny.floats(4, 16, 3)))


def _sounds(seed: int, count: int) -> np.ndarray:
    """Tones that die away; their loudness differs."""
    random, time = np.random.default_rng(seed), np.arange(512) / 512
    made = [np.sin(2 * np.pi * random.uniform(4, 80) * time) * np.exp(-8 * time) for _ in range(count)]
    return np.float32(np.stack(made) * 10 ** np.linspace(-2.5, 0, count)[:, None])[:, None]


def _noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 512)).astype(np.float32)


def _compiled(tmp_path: Path, tiny: Tiny, draw: Callable, passes: str = "qdq") -> tuple[dict[str, str], list[float]]:
    """What is said of each convolution, and the SQNR of each of 32 sounds that were not seen, in dB."""
    source, made, data = (tmp_path / name for name in ("model.onnx", "small.onnx", "data.npz"))
    proto = onnx.load_from_string(tiny.model())
    onnx.save(proto, source)
    name = proto.graph.input[0].name
    np.savez(data, **{name: draw(0, 8)})
    report = compile_model(
        source, Recipe(passes=parse_passes(passes)), output=made, calibration=Calibration([str(data)])
    )
    told = {d.node: d.reason for d in report.decisions["qdq"] if d.detail.get("kind") == "Conv"}
    runs = [session(onnx.load(path)) for path in (source, made)]
    ratios = []
    for sound in draw(1, 32):
        wanted, found = (np.concatenate([y.ravel() for y in run.run(None, {name: sound[None]})]) for run in runs)
        ratios.append(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))
    return told, ratios


def _apart(told: dict[str, str]) -> int:
    return sum(REASON in reason for reason in told.values())


@pytest.mark.parametrize("before", [("Identity",), ("Identity", "Identity")])
def test_a_coarse_spectrum_is_computed_in_float(tmp_path, before, monkeypatch) -> None:
    told, ratios = _compiled(tmp_path, _listener(before=before), _sounds)
    assert _apart(told) == 1
    assert len(told) == 3
    monkeypatch.setattr("qcompile.passes.qdq.qdq.coarse_islands", lambda *_: [])
    others, plain = _compiled(tmp_path, _listener(before=before), _sounds)
    assert not _apart(others)
    assert np.mean(ratios) > np.mean(plain)
    assert np.percentile(ratios, 10) > np.percentile(plain, 10) + 1


def test_one_that_a_grid_serves_is_integer(tmp_path) -> None:
    assert not _apart(_compiled(tmp_path, _listener(), _noise)[0])


@pytest.mark.parametrize(
    ("tiny", "passes"),
    [
        (_listener(spectrum=False), "qdq"),  # its codes are what the next one reads
        (_listener(twice=True), "qdq"),  # its input is rounded for another one, too
        (_listener(), "qdq(observer=minmax)"),  # which tells no error
        (_listener(), "qdq(provider=tensorrt)"),
    ],
    ids=["read", "shared", "minmax", "tensorrt"],
)
def test_others_are_integer(tmp_path, tiny, passes) -> None:
    assert not _apart(_compiled(tmp_path, tiny, _sounds, passes)[0])


def test_where_nothing_else_is_integer_it_is(tmp_path) -> None:
    tiny = Tiny()
    tiny.output(tiny.one("Conv", tiny.input("b", 1, 512), tiny.constant(_basis()), strides=[HOP]))
    assert not _apart(_compiled(tmp_path, tiny, _sounds)[0])


def test_power_is_the_mean_square() -> None:
    numbers = np.random.default_rng(0).normal(0.5, 2, 100_000)
    counts, edges = np.histogram(numbers, 400)
    assert Distribution(edges, counts.astype(float)).power == pytest.approx(np.square(numbers).mean(), rel=1e-3)
