"""kill -9 at random moments of a compile: the output is the old model or the new one, complete, and no litter stays."""

import hashlib
import json
import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.files.load import load_model
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration
from qcompile.models.tiny import tiny_decoder

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["qcompile.compiler.pipeline", "onnxruntime"])
KILLS, PAIRS = 50, 12
PASSES = parse_passes("pack")


def _pair(output: Path) -> tuple[str, ...]:
    """Hashes of the model and of the data it names, every byte of which is there."""
    model = load_model(output)  # checks that all external data is there
    (data,) = {Path(value.const_value.path) for value in model.graph.initializers.values() if _external(value)}
    return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in (output, data))


def _external(value: Any) -> bool:
    return hasattr(value.const_value, "location")


def _started(source: Path, output: Path, text: Path, bits: int) -> BaseProcess:
    """A process that compiles, forked from one that has imported everything and started no thread."""
    recipe = Recipe(passes=PASSES, bits=bits, group_size=32, samples=8, context=32)
    settings = {"output": output, "calibration": Calibration([str(text)])}
    process = SERVER.Process(target=compile_model, args=(source, recipe), kwargs=settings)
    process.start()
    return process


def _duration(source: Path, output: Path, text: Path, bits: int) -> float:
    started = time.monotonic()
    process = _started(source, output, text, bits)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.mark.slow
def test_kill_at_random_moments(bench: Any) -> None:
    source, text = bench.save(tiny_decoder()), bench.text
    out = bench.folder / "out"
    output = out / "model.onnx"
    known: dict[int, tuple[str, ...]] = {}
    for bits in (4, 8, 4):  # the first one waits for the imports
        seconds = _duration(source, output, text, bits)
        known[bits] = _pair(output)
    assert known[4] != known[8]
    assert len(list(out.iterdir())) == 4
    random_moments, outcomes = random.Random(0), []
    for number in range(KILLS):
        bits = 8 if _pair(output) == known[4] else 4
        process = _started(source, output, text, bits)
        # Half of the kills anywhere, half near the end, where files are written and renamed.
        early = 0.0 if number % 2 else 0.7
        time.sleep(seconds * random_moments.uniform(early, 1.2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        after = _pair(output)
        assert after in known.values()
        assert process.exitcode != 0 or after == known[bits]
        outcomes.append(after == known[bits])
        assert len(list(out.iterdir())) <= 12, "what killed runs leave is removed by the next, not piled up"
    assert set(outcomes) == {True, False}, "some kills came before the switch and some after it"
    _duration(source, output, text, 4)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["model.onnx", "model.report.html", "model.report.json", *(path.name for path in out.glob("model-*.data"))]
    )
    assert len(list(out.glob("model-*.data"))) == 1


@pytest.mark.slow
def test_two_compiles_to_one_output(bench: Any) -> None:
    """One of them wins whole: model, data and reports; a killed one among them takes nothing along."""
    source, text, random_moments = bench.save(tiny_decoder()), bench.text, random.Random(1)
    out = bench.folder / "out"
    output, known = out / "model.onnx", {}
    for bits in (4, 8, 4):  # the first one waits for the imports
        seconds = _duration(source, output, text, bits)
        known[_pair(output)] = bits
    for number in range(PAIRS):
        both = [_started(source, output, text, bits) for bits in random_moments.sample((4, 8), 2)]
        if number % 2:
            time.sleep(seconds * random_moments.uniform(0.5, 1.2))
            both[0].kill()
        for process in both:
            process.join()
        assert both[1].exitcode == 0
        assert both[0].exitcode in ((0, -signal.SIGKILL) if number % 2 else (0,))
        bits = known[_pair(output)]
        if number % 2 == 0:
            assert json.loads((out / "model.report.json").read_text())["recipe"]["bits"] == bits
            assert len(list(out.iterdir())) == 4, "the model, its data, two reports"
