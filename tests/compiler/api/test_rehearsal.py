"""compiler/api/rehearsal.py: what a dry run foretells is what the compile then does, for every graph of the table."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from graphs.table import Case, pairs

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.api.rehearsal import rehearse
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Decision
from qcompile.passes.errors import UserError

for module in sorted(path.stem for path in (Path(__file__).parents[2] / "graphs").glob("*.py")):
    importlib.import_module(f"graphs.{module}")

# What data decides: an input that may be minus infinity, experts without a token.
_BY_DATA = {"logits_of_which_an_input_forbids_some", "experts_without_a_token"}
_PAIRS = [(case, passes) for case, passes in pairs() if case.name not in _BY_DATA and "outlier" not in passes]
# One of so many runs with the others; all of them with the slow ones.
_EVERY = 23


def _told(decision: Decision) -> tuple[Any, ...]:
    own = decision.detail
    return decision.node, decision.action, decision.group, own.get("kind"), own.get("weights"), own.get("bytes")


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        pytest.param(case, passes, id=f"{case.name}-{passes}", marks=() if i % _EVERY == 0 else pytest.mark.slow)
        for i, (case, passes) in enumerate(_PAIRS)
    ],
)
def test_a_dry_run_foretells_nodes_bytes_and_refusals(row: Case, passes: str, tmp_path: Path) -> None:
    source, output, recipe, calibration = row.saved(row.made(), passes, tmp_path)
    try:
        report = compile_model(source, recipe, output=output, calibration=calibration)
    except UserError:
        _refused(source, recipe)
        return
    plan = rehearse(source, recipe)
    assert plan.refusal == ""
    assert {_told(d) for d in plan.report.quantizing} == {_told(d) for d in report.quantizing}
    assert plan.report.compiled_bytes == pytest.approx(report.compiled_bytes, rel=0.03, abs=16_000)
    assert plan.report.bits_per_weight == pytest.approx(report.bits_per_weight)


def _refused(source: Path, recipe: Recipe) -> None:
    """A refusal that data does not decide is foretold."""
    try:
        plan = rehearse(source, recipe)
    except UserError:
        return
    assert plan.refusal


def test_no_weight_is_read(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of a dry run are blank: rounding is not asked for."""
    source = bench.save(tiny_decoder())

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was rounded")

    places = ("ranges.round_to_nearest", "ranges.by_blocks", "pack.round_by_rows", "qdq.weights.quantize_weight")
    for place in (f"passes.{own}" for own in places):
        monkeypatch.setattr(f"qcompile.{place}", asked)
    for passes in ("pack", "smooth,awq,gptq,pack", "smooth,qdq", "dynamic"):
        assert rehearse(source, Recipe(passes=parse_passes(passes))).report.coverage == 1.0


def test_what_only_data_tells_is_named(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_decoder(layers=1))
    assert bench.run(source, "--passes", "outlier,qdq", "--keep-worst", "1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "open      which nodes stay in float for their sensitivity: only data tells" in shown
    assert "open      which channels outlier leaves in float: only data tells" in shown
    assert bench.run(source, "--passes", "rotate,pack", "--dry-run") == 0
    assert "open      which inputs rotate turns: only data tells" in capsys.readouterr().out


def test_a_compile_that_would_be_refused_is_told(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_decoder(layers=1))
    options = ("--passes", "pack", "--min-coverage", "1", "--include", "*down_proj*")
    assert bench.run(source, *options, "--dry-run") == 0
    assert "refused" not in capsys.readouterr().out, "what the user keeps in float does not count"
