"""A size that is given is one that the files keep, or an error; and where no budget can be spent."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.compiler import cli
from qcompile.compiler.api import spending
from qcompile.compiler.api.rehearsal import Rehearsal, rehearse
from qcompile.compiler.report.advice import remedies
from qcompile.compiler.sweep.budget.choose import added
from qcompile.models.tiny import tiny_classifier, tiny_decoder, tiny_encoder
from qcompile.passes.errors import UserError, Verdict

SIZE = 150_000


def _feeds(count: int = 8, length: int = 32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 256, (1, length))} for _ in range(count)]


def _size(folder: Path) -> int:
    return sum(own.stat().st_size for own in folder.iterdir() if ".report." not in own.name)


def _rehearsed_too_low(monkeypatch: pytest.MonkeyPatch, missed: int) -> None:
    def low(source: Path, recipe: qcompile.Recipe) -> Rehearsal:
        made = rehearse(source, recipe)
        made.report.compiled_bytes -= missed
        return made

    monkeypatch.setattr(spending, "rehearse", low)


def _compile(source: Path, folder: Path, passes: str, **fields: Any) -> Any:
    given = {"budget": "150kb", "calibration": _feeds(), **fields}
    return qcompile.compile(source, passes, output=folder / "o.onnx", **given)


def test_too_few_weights_are_told_before_any_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier, most of whose weights are of convolutions, which no packed format is for."""
    model = tmp_path / "m.onnx"
    ir.save(tiny_classifier(channels=64, classes=100), model)
    with monkeypatch.context() as patched:
        patched.setattr(spending, "Search", None)
        with pytest.raises(Verdict, match=r"only .* of the MatMul and Conv weights were quantized, below 0\.5"):
            qcompile.compile(model, "pack", budget="30kb", output=tmp_path / "o.onnx")
    with pytest.raises(UserError, match="cannot be made from text"):  # what is measured on
        qcompile.compile(model, "pack", budget="30kb", min_coverage=0, output=tmp_path / "o.onnx")


@pytest.mark.parametrize("passes", ["rotate,pack", "rotate(judge=false),pack"])
def test_nodes_that_turn_inputs_are_counted_before(
    source: Path, tmp_path: Path, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first compile is within the size: none is made again."""
    monkeypatch.setattr(spending, "_RUNS", 1)
    report = _compile(source, tmp_path, passes)
    assert _size(tmp_path) == report.compiled_bytes <= SIZE


@pytest.mark.parametrize("target", ["qcompile", "matmulnbits", "qdq"])
def test_what_turning_adds_is_less_than_is_counted(tmp_path: Path, target: str) -> None:
    """For a whole model, and for each layer more."""
    found = []
    for layers in (1, 4):
        model = tiny_decoder(layers=layers)
        ir.save(model, tmp_path / "m.onnx")
        given = {"target": target, "group_size": 64, "budget": None}
        sizes = [
            _compile(tmp_path / "m.onnx", tmp_path, passes, **given).compiled_bytes
            for passes in ("pack", "rotate(judge=false),pack")
        ]
        recipe = qcompile.Recipe(passes="rotate(judge=false),pack", target=target)
        found.append((sizes[1] - sizes[0], added(model, recipe)))
    (few, few_counted), (many, many_counted) = found
    assert 0 < few <= few_counted
    assert 0 < many - few <= many_counted - few_counted


@pytest.mark.parametrize("missed", [0, 40_000, 200_000])
def test_what_was_not_foretold_is_known_the_next_time(
    source: Path, tmp_path: Path, missed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal that is too low by so many bytes: another compile has as much less."""
    _rehearsed_too_low(monkeypatch, missed)
    report = _compile(source, tmp_path, "pack", budget="115kb")
    assert _size(tmp_path) == report.compiled_bytes <= 115_000
    assert report.compiled_bytes > 85_000


def test_channels_in_float_count(source: Path, tmp_path: Path) -> None:
    report = _compile(source, tmp_path, "outlier(most=0.05, threshold=0.001),pack", calibration=_feeds(16))
    assert any("outliers in float" in own.told for own in report.decisions["pack"])
    assert _size(tmp_path) == report.compiled_bytes <= SIZE
    with pytest.raises(UserError, match="outlier leaves channels in float by data"):
        _compile(source, tmp_path, "outlier,pack", budget="5bpw")


def test_what_is_too_large_each_time_is_told_and_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spending, "_RUNS", 1)
    _rehearsed_too_low(monkeypatch, 40_000)
    with pytest.raises(UserError, match=r"the output takes 0\.\d+ MB, 0\.\d+ MB more than its budget of 0.115 MB"):
        _compile(source, tmp_path, "pack", budget="115kb")
    assert not list(tmp_path.iterdir())


def test_where_no_budget_is_spent(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a budget is spent by"):
        rehearse(source, qcompile.Recipe(passes="pack", budget="5bpw"))
    for grid, recipe in (({"budget": ["4bpw", "5bpw"]}, None), ({"bits": [4, 8]}, qcompile.Recipe(budget="4bpw"))):
        with pytest.raises(UserError, match="a sweep spends no budget"):
            qcompile.sweep(source, grid, output=tmp_path / "s", recipe=recipe)


@pytest.mark.parametrize(
    ("bound", "told"),
    [("--max-kl", "encoder.onnx of 2 models: max_kl is for decoders, and this model has no logits"),
     ("--min-sqnr", "decoder.onnx of 2 models: min_sqnr is for models without logits")],
)  # fmt: skip
def test_a_bound_of_one_kind_of_model_is_told_before_another_is_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bound: str, told: str
) -> None:
    (tmp_path / "in").mkdir()
    ir.save(tiny_decoder(layers=1), tmp_path / "in" / "decoder.onnx")
    ir.save(tiny_encoder(layers=1), tmp_path / "in" / "encoder.onnx")
    (tmp_path / "in" / "export.json").write_text('{"graphs": {"encoder.onnx": 0, "decoder.onnx": 0}}')
    words = [str(tmp_path / "in"), "--passes", "pack", bound, "20", "-o", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_bytes_are_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("encoder", "decoder"):
        ir.save(tiny_decoder(layers=1), tmp_path / "in" / f"{name}.onnx")
    (tmp_path / "in" / "export.json").write_text('{"graphs": {"encoder.onnx": 0, "decoder.onnx": 0}}')
    assert cli.main([str(tmp_path / "in"), "--budget", "150kb", "-o", str(tmp_path / "out")]) == 2
    told = "a budget in bytes is for one model, and here are decoder.onnx, encoder.onnx: give bits a weight"
    assert told in " ".join(capsys.readouterr().err.split())
    _compile(tmp_path / "in" / "encoder.onnx", tmp_path, "pack")
    points = ["--budget-file", str(tmp_path / "o.report.json"), "--point", "2"]
    assert cli.main([str(tmp_path / "in"), *points, "-o", str(tmp_path / "out")]) == 2
    assert "is of one model, and here are decoder.onnx, encoder.onnx" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_advice_leaves_formats_to_the_budget(source: Path, tmp_path: Path) -> None:
    tried = remedies(_compile(source, tmp_path, "pack", weights_of=["*q_proj*=int8"]))
    assert tried
    for own in tried:
        assert "--budget 150kb" in own.command
        assert own.command.count("--weights-of") == 1
        assert "--group-size" not in own.command


@pytest.mark.parametrize("worst", [0, -1])
def test_at_least_one_node_is_explained(source: Path, tmp_path: Path, worst: int) -> None:
    _compile(source, tmp_path, "pack", budget=None)
    with pytest.raises(UserError, match=f"worst= must be at least 1, got {worst}"):
        qcompile.explain(tmp_path / "o.onnx", worst=worst)
