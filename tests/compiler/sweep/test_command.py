"""`qcompile sweep`: what is printed, Ctrl-C, bad input."""

from typing import Any

import pytest
from said import complaints

from qcompile.compiler.cli import main
from qcompile.compiler.console import terminal
from qcompile.compiler.sweep import run as module
from qcompile.models.tiny import tiny_decoder


def test_the_command(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = bench.save(tiny_decoder(layers=1))
    folder = bench.folder / "out"
    words = [
        "sweep",
        model,
        "--grid",
        "bits=4,8",
        "group_size=32",
        "samples=4",
        "context=32",
        "passes=pack;smooth,pack",
    ]
    options = ["--calibration", bench.text, "--context", 32, "--tokens", 128, "-o", folder, "--note", "a note"]
    assert main([str(word) for word in [*words, *options, "--limit", "3"]]) == 0
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 3
    assert "3/4  int8 pack: " in shown.err
    assert "min left" in shown.err.splitlines()[0]
    assert "int8 smooth,pack: open" in shown.out
    assert "a note" in shown.out
    assert f"wrote     {folder / 'accuracy.svg'}" in shown.out
    assert main([str(word) for word in [*words, *options]]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_plain_lines_say_what_is_done(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The float model's windows before any combination, then combinations: none is done before its end."""
    monkeypatch.setattr(terminal, "_OFTEN", -1)
    words = ["sweep", bench.save(tiny_decoder(layers=1)), "--grid", "bits=4", "passes=pack", "context=32", "samples=4"]
    words += ["--context", "32", "--tokens", "128", "-o", bench.folder / "out"]
    assert main([str(word) for word in words]) == 0
    told = [line.split("s  ", 1)[-1] for line in capsys.readouterr().err.splitlines()]
    assert told[0] == "running the float model"
    assert [line.split(",")[0] for line in told if "float model: " in line] == [
        f"running the float model: {done} of 4" for done in range(1, 5)
    ]
    scoring = [line for line in told if ": scoring: " in line]
    assert scoring
    assert all(": 0 of 1" in line for line in scoring[:-1])


def test_ctrl_c(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compile_model", interrupted)
    words = [
        "sweep",
        bench.save(tiny_decoder(layers=1)),
        "--grid",
        "passes=pack",
        "--tokens",
        64,
        "-o",
        bench.folder / "out",
    ]
    assert main([str(word) for word in words]) == 130
    assert capsys.readouterr().err == (
        "qcompile: interrupted: 0 combinations finished now; the same command goes on from here\n"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--grid", "bits=5"], "bits=5 is never possible"),
        (["--grid", "bits=4", "--limit", "-1"], "--limit must be 0 or more"),
        (["--grid", "bits=4", "--tokens", "1"], "--tokens must be at least 2"),
        (["--grid", "bits=4", "--text", "a.txt", "--data", "a.npz"], "either --text FILE or --data"),
        (["--grid", "bits=4", "--calibration", "none.txt"], "none.txt: no such text file"),
        (["--grid", "bits=4", "--calibration", "module:function"], "a sweep takes files only"),
        (["--grid", "bits=4", "--calibration", "{text}", "--text", "{text}"], "is calibrated on and scored on"),
        (
            ["--grid", "bits=4", "calibration=self,general", "--text", "{text}"],
            "100% of what models are scored on of text.txt",
        ),
        (["--grid", "bits=4", "calibration=genral"], "genral: no such file or folder: did you mean 'general'?"),
        (["--grid", "bits=4", "--text", "{text}", "{text}"], "two files are called"),
        (["--grid", "bits=4", "--data", "general"], "general is text: no array (.npz, .npy) and no image"),
        (["--grid", "bits=4", "--data", "self"], "self is a word for --calibration, and stands alone there"),
        (["--grid", "bits=4", "-o", "{text}"], "is no folder"),
        ([], "--grid KEY=VALUES… is missing"),
    ],
)
def test_bad_input_is_one_line(bench: Any, capsys: pytest.CaptureFixture[str], options: list[str], reason: str) -> None:
    model = bench.save(tiny_decoder(layers=1))
    output = [] if "-o" in options else ["-o", str(bench.folder / "out")]
    words = ["sweep", str(model), *output, *(word.format(text=bench.text) for word in options)]
    assert main(words) == 2
    error = complaints(capsys.readouterr().err)
    assert reason in error
    assert error.count("\n") == 1
    assert not (bench.folder / "out" / "cache").exists(), "nothing has run"
