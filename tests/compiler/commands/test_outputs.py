"""What a command writes never replaces what it reads, nor weights that another model names, nor a model by results."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_graphs import Tiny
from said import complaints

from qcompile.compiler.cli import main

QDQ = ["--passes", "qdq", "--calibration", "c.npz"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its data file, arrays for it, statistics, a compiled model, and a recipe."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny = Tiny()
        x = tiny.input(16, 64)
        h = tiny.one("Relu", tiny.one("MatMul", x, tiny.floats(64, 64)))
        model = tiny.output(tiny.one("MatMul", h, tiny.floats(64, 8))).model()
        onnx.save(model, "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
        np.savez("c.npz", **{x: np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)})
        Path("r.yaml").write_text("passes: [qdq]\n")
        assert main(["m.onnx", *QDQ, "-o", "q.onnx"]) == 0
        assert main(["calibrate", "m.onnx", *QDQ, "-o", "s.npz"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


WORK = [
    ["compile", "m.onnx", *QDQ, "--recipe", "r.yaml", "-o"],
    ["compile", "m.onnx", *QDQ, "--recipe", "r.yaml", "-o", "new.onnx", "--save-recipe"],
    ["calibrate", "m.onnx", *QDQ, "-o"],
    ["sensitivity", "m.onnx", *QDQ, "-o"],
    ["eval", "q.onnx", "--against", "m.onnx", "--data", "c.npz", "--json"],
    ["bench", "q.onnx", "--against", "m.onnx", "--rounds", "1", "--json"],
]


# Not: a model compiled anew over its older form; arrays that bench does not read.
LOSSES = [
    (words, output)
    for words in WORK
    for output in ("m.onnx", "m.data", "c.npz", "q.onnx", "q-*.data")
    if (words, output) not in ((WORK[0], "q.onnx"), (WORK[-1], "c.npz"))
]


@pytest.mark.parametrize(("arguments", "output"), LOSSES, ids=[f"{w[0]} {w[-1]} {o}" for w, o in LOSSES])
def test_nothing_that_is_there_is_lost(
    here: Path, arguments: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, target = _content(here), next(here.glob(output)).name
    assert main([*arguments, target]) == 2
    said = complaints(capsys.readouterr().err)
    assert said.count("\n") == 1
    assert target in said
    assert _content(here) == before


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (WORK[0], "r.yaml"),
        (["compile", "m.onnx", "--passes", "qdq", "--statistics", "s.npz", "-o"], "s.npz"),
        (["compile", "m.onnx", "--passes", "qdq", "--calibration", ".", "-o"], "c.npz"),
        (["compile", "m.onnx", "--passes", "qdq", "--calibration", ".", "-o"], "linked.npz"),
    ],
)
def test_nor_anything_else_that_is_read(here: Path, arguments: list[str], output: str) -> None:
    os.link("c.npz", "linked.npz")
    before = _content(here)
    assert main([*arguments, output]) == 2
    assert _content(here) == before


@pytest.mark.parametrize("arguments", WORK[2:], ids=lambda words: words[0])
def test_results_that_cannot_be_written_are_refused_before_the_work(
    here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for target, message in ((".", "is a folder"), ("r.yaml/x.json", "is a file, not a folder")):
        assert main([*arguments, target]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [("a\udcff.onnx", "is no text"), ("a.ort", "for one in its own format")],
)
def test_names_that_no_model_can_have(
    here: Path, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["m.onnx", *QDQ, "-o", output]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["a.json", "a.textproto", "a.txt", "a"])
def test_a_model_is_read_back_whatever_the_end_of_its_name(here: Path, output: str) -> None:
    assert main(["m.onnx", *QDQ, "-o", output]) == 0
    assert onnx.load(output, format="protobuf").graph.node


@pytest.mark.parametrize("command", ["compile", "calibrate", "sensitivity"])
def test_a_folder_of_several_models_is_none(here: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing says that they belong together, and nothing is written."""
    before = _content(here)
    assert main([command, ".", *QDQ]) == 2
    assert ". holds 2 models (m.onnx, q.onnx)" in capsys.readouterr().err
    assert _content(here) == before


def test_absurd_numbers_of_threads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "m.onnx", "--threads", "1,99999999"]) == 2
    assert "1024 at most" in capsys.readouterr().err


def test_an_empty_word_for_data_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It named the current folder: an unset variable of the shell calibrated on whatever lies there."""
    assert main(["m.onnx", "--passes", "qdq", "--calibration", "", "-o", "new.onnx"]) == 2
    assert "an empty name" in capsys.readouterr().err
