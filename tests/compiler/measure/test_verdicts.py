"""Verdicts of `qcompile eval`: classes, labels, metrics, bounds with exit code 1, and what is no test data."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler import cli
from qcompile.compiler.commands import compile as compile_command
from qcompile.compiler.data.labels import read_labels
from qcompile.compiler.measure.classes import Classes, scores_classes
from qcompile.compiler.measure.metric import Drop
from qcompile.compiler.measure.metrics import OutputNoise
from qcompile.models.tiny import tiny_conv, tiny_decoder
from qcompile.passes.errors import UserError


def _inputs(bench: Any, name: str, rows: int, seed: int) -> Path:
    path = bench.folder / name
    np.savez(path, **{"image": np.random.default_rng(seed).standard_normal((rows, 3, 32, 32)).astype(np.float32)})
    return path


@pytest.fixture
def compiled(bench: Any) -> tuple[Path, Path, Path, Path]:
    """(float model, int8 model, what that was calibrated on, other rows)."""
    source = bench.save(tiny_conv(), tokenizer=False)
    seen, other = _inputs(bench, "seen.npz", 16, 0), _inputs(bench, "other.npz", 40, 1)
    output = bench.folder / "o" / "m.onnx"
    assert cli.main([str(source), "--passes", "qdq", "--calibration", str(seen), "-o", str(output)]) == 0
    return source, output, seen, other


def test_classes_and_labels_are_told(compiled: tuple[Path, ...], capsys: Any, tmp_path: Path) -> None:
    source, output, _, other = compiled
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"row{i}.png {i % 3}" for i in range(40)))
    told = tmp_path / "told.json"
    command = ["eval", str(output), "--against", str(source), "--data", str(other), "--labels", str(labels)]
    assert cli.main([*command, "--json", str(told)]) == 0
    shown = capsys.readouterr().out
    assert "top-1" in shown
    assert "of 40 rows flip" in shown
    scores = json.loads(told.read_text())[0]["classes"]
    assert scores["rows"] == 40
    assert scores["flips"] == round(40 * (1 - scores["top1"]))
    assert scores["lost"] - scores["won"] == round(40 * (scores["reference"] - scores["accuracy"]))


@pytest.mark.parametrize(
    ("bound", "code"),
    [
        (["--min-sqnr", "1"], 0),
        (["--min-sqnr", "90"], 1),
        (["--max-drop", "100%"], 0),
        (["--max-kl", "1"], 2),
        (["--max-drop", "much"], 2),
    ],
)
def test_a_broken_bound_is_exit_code_one(compiled: tuple[Path, ...], capsys: Any, bound: list[str], code: int) -> None:
    source, output, _, other = compiled
    assert cli.main(["eval", str(output), "--against", str(source), "--data", str(other), *bound]) == code
    printed = capsys.readouterr()
    assert ("SQNR dB" in printed.out) == (code < 2), "the table comes before the verdict"
    assert [line for line in printed.err.splitlines() if line.startswith("qcompile:")] == printed.err.splitlines()[
        -1:
    ] * (code > 0)


def test_the_document_of_a_broken_bound(compiled: tuple[Path, ...], capsys: Any) -> None:
    source, output, _, other = compiled
    command = ["eval", str(output), "--against", str(source), "--data", str(other), "--min-sqnr", "90", "--json"]
    assert cli.main(command) == 1
    assert json.loads(capsys.readouterr().out)[0]["sqnr"] < 90


def test_a_metric_of_the_users(
    compiled: tuple[Path, ...], capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, _, other = compiled
    (tmp_path / "own_metric.py").write_text(
        "import numpy as np\n"
        "def largest(inputs, outputs, labels):\n"
        "    assert len(inputs) == len(outputs) and labels is None\n"
        "    return sum(float(np.abs(next(iter(o.values()))).max()) for o in outputs)\n"
        "def broken(inputs, outputs, labels):\n"
        "    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["eval", str(output), "--against", str(source), "--data", str(other), "--metric"]
    assert cli.main([*command, "own_metric:largest"]) == 0
    assert "metric " in capsys.readouterr().out
    assert cli.main([*command, "own_metric:largest", "--max-drop", "90%"]) == 0
    assert cli.main([*command, "own_metric:broken"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert cli.main([*command, "own_metric:nothing"]) == 2


def test_calibration_data_is_no_test_data(compiled: tuple[Path, ...], capsys: Any, bench: Any) -> None:
    """By its content, whatever it is called."""
    source, output, seen, _ = compiled
    copy = bench.folder / "copy.npz"
    copy.write_bytes(seen.read_bytes())
    for path in (seen, copy):
        assert cli.main(["eval", str(output), "--against", str(source), "--data", str(path)]) == 2
        assert "is no test data" in capsys.readouterr().err
    command = [str(source), "--passes", "qdq", "--calibration", str(seen), "--eval-data", str(copy)]
    assert cli.main([*command, "-o", str(bench.folder / "p" / "m.onnx")]) == 2
    assert "it is calibrated on (as seen.npz), too" in capsys.readouterr().err


def test_the_bundled_text_that_is_calibrated_on_is_not_judged_on(bench: Any, capsys: Any) -> None:
    """--calibration general said so of --eval-data, too, which then was refused as calibrated on."""
    source, other = bench.save(tiny_decoder(layers=1)), bench.folder / "other.txt"
    other.write_text("".join(f"{number} is less than {number + 1}\n" for number in range(200)))
    words = ["--passes", "smooth,dynamic", "--calibration", "general", "--eval-data"]
    assert bench.run(source, *words, str(other)) == 0
    assert "tokens of other.txt" in capsys.readouterr().out
    assert bench.run(source, *words, "general") == 2
    assert "the bundled text is no test data: it is calibrated on, too" in " ".join(capsys.readouterr().err.split())


def test_accuracy_is_told_of_rows_that_nothing_was_fitted_to(compiled: tuple[Path, ...], capsys: Any) -> None:
    source, output, seen, other = compiled
    plain = json.loads(output.with_name("m.report.json").read_text())
    assert "of the calibration data itself" in plain["measured"]
    before = output.read_bytes()
    command = [str(source), "--passes", "qdq", "--calibration", str(seen), "--eval-data", str(other), "-o", str(output)]
    assert cli.main(command) == 0
    assert "measured on 40 rows of other.npz" in capsys.readouterr().out
    plain = json.loads(output.with_name("m.report.json").read_text())
    assert plain["measured"] == "40 rows of other.npz"
    assert plain["outputs"][0]["error"] > 0
    assert output.read_bytes() == before, "what the accuracy is told on changes nothing else"


def test_a_decoders_headline_is_on_text_that_calibration_left_out(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "smooth,pack", samples=4, context=32)
    assert report.measured.endswith("not calibrated on")
    assert report.predictions.kl_error > 0
    assert report.outputs[0].name == "logits"


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 30), st.floats(1e-3, 1.0))
def test_the_standard_error_is_that_of_other_draws(seed: int, rows: int, size: float) -> None:
    """Within what the estimate of a deviation from few rows may be off."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> OutputNoise:
        noise, wanted = OutputNoise(), rng.standard_normal((count, 64))
        noise.add(wanted, wanted + size * rng.standard_normal((count, 64)))
        return noise

    own = draw(rows).deviation
    assert own is not None
    assert own < np.std([draw(rows).relative for _ in range(40)]) * 8
    assert draw(1).deviation is None


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(2, 9))
def test_classes_count_what_changed(seed: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, count))
    b = a + 0.5 * rng.standard_normal((rows, count))
    labels = rng.integers(count, size=rows)
    own = Classes()
    for start in range(0, rows, 7):
        own.add(a[start : start + 7], b[start : start + 7])
    scores = own.scores(labels)
    assert scores is not None
    before, after = a.argmax(axis=1), b.argmax(axis=1)
    assert scores.flips == (before != after).sum()
    assert scores.accuracy == pytest.approx((after == labels).mean())
    assert (scores.lost, scores.won) == (
        ((before == labels) & (after != labels)).sum(), ((before != labels) & (after == labels)).sum()
    )  # fmt: skip
    assert (scores.top5 is None) == (count < 6)
    assert scores.top5 is None or scores.top5 >= scores.top1


def test_which_outputs_score_classes() -> None:
    shapes = {(4, 10): True, (4, 10, 1, 1): True, (4, 1): False, (4,): False, (4, 10, 7): False, (0, 10): False}
    assert {shape: scores_classes("scores", np.zeros(shape)) for shape in shapes} == shapes
    assert not scores_classes("pooler_output", np.zeros((4, 384)))


@pytest.mark.parametrize(("text", "lost"), [("0.5%", 10.0), ("0.01", 0.08)])
def test_drops(text: str, lost: float) -> None:
    assert Drop(text).of(0.8, 0.72) == pytest.approx(lost)
    assert Drop(text).of(0.72, 0.8, lower_is_better=True) > 0
    assert Drop(text).of(0.72, 0.8) < 0


def test_labels_in_all_forms(tmp_path: Path) -> None:
    wanted = [3, 0, 12]
    np.save(tmp_path / "a.npy", np.array(wanted))
    np.savez(tmp_path / "a.npz", labels=np.array(wanted, np.int32))
    (tmp_path / "plain.txt").write_text("3\n0\n\n12\n")
    (tmp_path / "named.csv").write_text("c.png,12\nx/a.png,3\nb.png,0\n")
    for name in ("a.npy", "a.npz", "plain.txt"):
        assert read_labels(tmp_path / name).tolist() == wanted
    assert read_labels(tmp_path / "named.csv", ["a.png", "b.png", "c.png"]).tolist() == wanted
    (tmp_path / "bad.txt").write_text("3\nthree\n")
    np.save(tmp_path / "bad.npy", np.zeros(3))
    for name in ("bad.txt", "bad.npy", "none.txt"):
        with pytest.raises(UserError, match="--labels"):
            read_labels(tmp_path / name)


def test_a_compile_with_a_bound_on_its_score(compiled: tuple[Path, ...], capsys: Any, tmp_path: Path) -> None:
    source, output, seen, other = compiled
    labels = tmp_path / "labels.npy"
    np.save(labels, np.zeros(40, np.int64))
    command = [str(source), "--passes", "qdq", "--calibration", str(seen), "-o", str(output)]
    judged = ["--eval-data", str(other), "--labels", str(labels)]
    assert cli.main([*command, *judged, "--max-drop", "50%", "--bench"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy " in shown
    assert "ms a run of 40 rows" in shown
    assert json.loads(output.with_name("m.report.json").read_text())["speed"]["runs"] >= 5
    assert cli.main([*command, "--max-drop", "1%"]) == 2
    assert "are for --eval-data" in capsys.readouterr().err
    assert cli.main([*command, *judged, "--max-drop", "a lot"]) == 2


def test_what_cannot_be_scored_is_said_before_the_compile(
    compiled: tuple[Path, ...], capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, seen, other = compiled
    monkeypatch.setattr(compile_command, "compile_model", None)
    (tmp_path / "t.txt").write_text("words")
    np.save(tmp_path / "hot.npy", np.eye(40, dtype=np.int64))
    command = [str(source), "--passes", "qdq", "--calibration", str(seen), "-o", str(output), "--eval-data"]
    for words in (["--max-drop", "1%"], ["--labels", str(tmp_path / "hot.npy")]):
        assert cli.main([*command, str(tmp_path / "t.txt"), *words]) == 2
        assert "t.txt is text: " in capsys.readouterr().err
    assert cli.main([*command, str(other), "--labels", str(tmp_path / "hot.npy")]) == 2
    assert "one-hot" in capsys.readouterr().err


def test_an_interrupt_while_a_model_is_judged_says_that_it_is_written(
    compiled: tuple[Path, ...], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, seen, other = compiled
    before = output.stat().st_mtime_ns

    def judging(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_command, "evaluate_models", judging)
    command = [str(source), "--passes", "qdq", "--calibration", str(seen), "-o", str(output)]
    assert cli.main([*command, "--eval-data", str(other), "--max-drop", "50%"]) == 130
    assert f"interrupted: {output} is written" in capsys.readouterr().err
    assert output.stat().st_mtime_ns > before
