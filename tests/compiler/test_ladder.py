"""compiler/ladder.py, passes/proxies.py: what works without data, what does not, and what each step is worth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.report.page import to_html
from qcompile.compiler.results.ladder import MIXED, NORMS, NOTHING, SELF, Ladder, Rung
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.linears import find_linears
from qcompile.passes.proxies import guessed, proxies


def _climbed(bench: Any, model: ir.Model, passes: str, *calibration: str, tokenizer: bool = False) -> Report:
    path = bench.save(model, tokenizer=tokenizer)
    return bench.compile(path, passes, calibration=list(calibration))  # type: ignore[no-any-return]


def _names(report: Report) -> list[str]:
    assert report.ladder is not None
    return [rung.name for rung in report.ladder.rungs]


def test_each_step_is_measured_and_the_last_one_is_written(bench: Any) -> None:
    report = _climbed(bench, tiny_decoder(), "smooth,dynamic")
    assert _names(report) == [NOTHING, NORMS, SELF, MIXED]
    none, norms, own, mixed = report.ladder.rungs  # type: ignore[union-attr]
    assert [rung.passes for rung in (none, norms, own, mixed)] == [("dynamic",), *[("smooth", "dynamic")] * 3]
    # The outliers of the tiny decoder are planted in its gammas, which norms and data both see.
    assert own.distance < 0.5 * none.distance
    assert norms.distance < 0.5 * none.distance
    assert 0 < mixed.distance < 0.5 * none.distance
    assert mixed.distance != own.distance
    assert own.told == f"KL {own.distance:.3g} nats a token"
    written = json.loads((bench.folder / "out/model.report.json").read_text())["ladder"]
    assert [rung["distance"] for rung in written["rungs"]] == [rung.distance for rung in (none, norms, own, mixed)]


def test_norms_alone_make_the_file_of_their_rung(bench: Any) -> None:
    both = _climbed(bench, tiny_decoder(), "smooth,dynamic")
    report = _climbed(bench, tiny_decoder(), "smooth,dynamic", "norms")
    assert _names(report) == [NOTHING, NORMS]
    assert report.ladder.rungs == both.ladder.rungs[:2]  # type: ignore[union-attr]
    assert any(d.action == "folded" for d in report.decisions["smooth"])
    assert report.data == "none: scales of norms stand in"


@pytest.mark.parametrize(
    ("passes", "rungs"),
    [
        ("smooth,qdq", [NOTHING, NORMS, SELF, MIXED]),
        ("smooth,awq,gptq,pack", [NOTHING, NORMS, SELF, MIXED]),
        ("gptq,pack", [NOTHING, SELF, MIXED]),  # correlations are all that gptq wants
        ("qdq,bias_correction", [NOTHING, SELF, MIXED]),
    ],
)
def test_rungs_run_the_passes_that_can_work_there(bench: Any, passes: str, rungs: list[str]) -> None:
    report = _climbed(bench, tiny_decoder(layers=1), passes)
    assert _names(report) == rungs
    if "gptq" in passes:
        assert all("gptq" not in rung.passes for rung in report.ladder.rungs[:-2])  # type: ignore[union-attr]


def test_the_ladder_says_that_only_its_last_step_keeps_nodes(bench: Any) -> None:
    path = bench.save(tiny_decoder(layers=1), tokenizer=False)
    ladder = bench.compile(path, "smooth,qdq", calibration=(), keep_worst=2).ladder
    assert ladder.windows.endswith("; 2 nodes are kept in float in the last step alone")


@pytest.mark.parametrize(("passes", "calibration"), [("qdq", ()), ("pack", ()), ("dynamic", ("norms",))])
def test_no_ladder_where_there_is_nothing_to_climb(bench: Any, passes: str, calibration: tuple[str, ...]) -> None:
    assert _climbed(bench, tiny_decoder(layers=1), passes, *calibration).ladder is None


def test_no_ladder_where_there_is_text(bench: Any) -> None:
    assert _climbed(bench, tiny_decoder(layers=1), "smooth,dynamic", str(bench.text), tokenizer=True).ladder is None


def test_self_wins_over_the_bundled_text(bench: Any) -> None:
    report = _climbed(bench, tiny_decoder(layers=1), "smooth,dynamic", "self", tokenizer=True)
    assert report.data.endswith("sampled from the model itself, and as many of random tokens")
    assert _names(report)[-2:] == [SELF, MIXED]


def test_an_encoder_has_norms_only(bench: Any) -> None:
    report = _climbed(bench, tiny_encoder(), "smooth,dynamic", "norms")
    assert _names(report) == [NOTHING, NORMS]
    assert "random inputs" in report.ladder.windows  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("passes", "name"),
    [("smooth,qdq", "qdq"), ("gptq,pack", "gptq"), ("smooth,qdq,bias_correction", "bias_correction")],
)
def test_norms_are_not_enough_for_everything(
    bench: Any, capsys: pytest.CaptureFixture[str], passes: str, name: str
) -> None:
    path, options = bench.save(tiny_decoder(layers=1)), ["--passes", passes, "--calibration", "norms"]
    bench.refuses(capsys, path, options, rf"--calibration norms runs nothing, and {name} needs activations.*self")


def test_an_encoder_cannot_generate_text(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path, options = bench.save(tiny_encoder()), ["--passes", "smooth,qdq", "--calibration", "self"]
    bench.refuses(capsys, path, options, r"no decoder to sample text from.*--calibration norms")


def test_a_file_of_that_name_is_a_file(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norms").write_text("abcdefgh" * 64)
    report = _climbed(bench, tiny_decoder(layers=1), "smooth,dynamic", "norms", tokenizer=True)
    assert report.ladder is None
    assert "from norms" in report.data


def test_proxies_are_gamma_and_leave_the_unknown_out() -> None:
    model = tiny_decoder(layers=1)
    linears = find_linears(model.graph)
    widths = {linear.activation: linear.shape[0] for linear in linears}
    found = proxies(widths.items())
    assert found
    assert found.keys() == {value for value, width in widths.items() if not isinstance(guessed(value, width), str)}
    for value, statistics in found.items():
        reach, power = guessed(value, widths[value])
        assert statistics.gram.shape == (widths[value], widths[value])
        np.testing.assert_allclose(statistics.mean_square, power, rtol=1e-6)
        np.testing.assert_array_equal(statistics.absmax, reach)


def test_the_ladder_says_where_a_lower_rung_is_better() -> None:
    rungs = [Rung(NOTHING, ("pack",), 0.3, "KL 0.3"), Rung(NORMS, ("awq", "pack"), 0.1, "KL 0.1")]
    ladder = Ladder((*rungs, Rung(SELF, ("awq", "pack"), 0.2, "KL 0.2")), "2 batches of 48 rows")
    assert ladder.best is rungs[1]
    assert [words for _, words in ladder.steps()] == [
        "KL 0.3",
        "KL 0.1, 67% less than the step before",
        "KL 0.2, 100% more than the step before",
    ]
    assert ladder.lines()[-1].strip() == f"{NORMS} did better than {SELF}: try --calibration norms"
    assert Ladder((rungs[0], rungs[1]), "").advice == ""
    own = Ladder((Rung(SELF, ("pack",), 0.2, ""), Rung(MIXED, ("pack",), 0.3, "")), "")
    assert own.advice == f"{SELF} did better than {MIXED}: try --calibration FILE, text of your own"
    report = Report("a.onnx", "hash", {}, {}, ladder=ladder)
    assert f"{NORMS} did better than {SELF}" in to_html(report)
