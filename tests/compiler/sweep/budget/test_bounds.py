"""--max-kl and --min-sqnr of packed weights: the least that keeps the bound, on data that nothing else has seen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.compiler import pipeline
from qcompile.compiler.api import spending
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.mixed.ranking import Ranking
from qcompile.compiler.mixed.windows import check_windows, held_windows
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount, TooLarge
from qcompile.compiler.stages import gather_data, prepare_model
from qcompile.compiler.sweep.budget import choose
from qcompile.compiler.sweep.budget.allocate import Option
from qcompile.compiler.sweep.budget.choose import Search
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.models.tiny.tokenizer import tiny_tokenizer
from qcompile.passes.errors import UserError, Verdict


def _feeds(count: int = 16, length: int = 32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 256, (1, length))} for _ in range(count)]


def _compiled(source: Path, folder: Path, **fields: Any) -> Report:
    given = {"calibration": _feeds(), **fields}
    return qcompile.compile(source, given.pop("passes", "pack"), output=folder / "o.onnx", **given)


def _distances(report: Report) -> list[float]:
    assert report.frontier is not None
    return [own.distance for own in report.frontier.tried]


def _misprice(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Have every change foretold too large by a factor."""
    options_of = choose.options_of

    def wrong(*args: Any) -> list[list[Option[str]]]:
        return [[replace(own, cost=factor * own.cost) for own in unit] for unit in options_of(*args)]

    monkeypatch.setattr(choose, "options_of", wrong)


@pytest.mark.parametrize("bound", [0.1, 0.05, 0.005])
def test_the_bound_holds_and_much_looser_ones_are_smaller(source: Path, tmp_path: Path, bound: float) -> None:
    report = _compiled(source, tmp_path, max_kl=bound)
    assert report.frontier is not None
    own = next(one for one in report.frontier.tried if one.size == report.compiled_bytes)
    assert own.distance <= bound
    assert 1 <= len(report.frontier.tried) <= 3
    assert all(one.size >= own.size for one in report.frontier.tried if one.distance <= bound)
    assert report.target[0].startswith(f"max_kl {bound:g}: ")
    looser = _compiled(source, tmp_path, max_kl=20 * bound)
    assert looser.compiled_bytes < report.compiled_bytes


def test_an_encoder_keeps_decibels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = ("attention_mask", "token_type_ids")
    data = [
        {"input_ids": random.integers(0, 256, (1, 24)), **{name: np.ones((1, 24), np.int64) for name in names}}
        for _ in range(16)
    ]
    ir.save(tiny_encoder(), tmp_path / "m.onnx")
    report = _compiled(tmp_path / "m.onnx", tmp_path, calibration=data, min_sqnr=25)
    assert -20 * np.log10(min(_distances(report))) >= 25
    with pytest.raises(UserError, match="max_kl is for decoders"):
        _compiled(tmp_path / "m.onnx", tmp_path, calibration=data, max_kl=0.1)


@pytest.mark.parametrize("factor", [30.0, 1 / 30])
def test_what_was_foretold_wrongly_is_repaired(
    source: Path, tmp_path: Path, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too low by the factor, so that the first compile breaks the bound; or too high, so that it is larger than it need
    be. All of it is in the report that lies there.
    """
    plain = _compiled(source, tmp_path, max_kl=0.03)
    _misprice(monkeypatch, 1 / factor)
    report = _compiled(source, tmp_path, max_kl=0.03)
    distances = _distances(report)
    assert 2 <= len(distances) <= 3
    assert (distances[0] > 0.03) == (factor > 1)
    assert report.compiled_bytes == pytest.approx(plain.compiled_bytes, rel=0.1)
    written = json.loads((tmp_path / "o.report.json").read_text())
    assert [own["distance"] for own in written["frontier"]["tried"]] == distances
    assert (tmp_path / "o.report.html").read_text().count("<title>compiled: ") == len(distances)


def test_weights_that_changed_nothing_where_it_was_measured_get_bits_all_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as experts without a token on the few windows: what is held aside meets them."""
    ranking_of = choose.ranking_of

    def silent(*args: Any, **fields: Any) -> Ranking:
        found = ranking_of(*args, **fields)
        return replace(found, nodes=tuple(replace(own, effect=found.all_float) for own in found.nodes))

    monkeypatch.setattr(choose, "ranking_of", silent)
    report = _compiled(source, tmp_path, max_kl=0.03)
    distances = _distances(report)
    assert distances[0] > 0.03
    assert min(distances) <= 0.03
    wide = _compiled(source, tmp_path, budget="8bpw")
    assert wide.bits_per_weight == pytest.approx(8, abs=0.2)


def test_compiles_that_do_not_go_far_enough_are_not_the_budget_s_fault(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = Search.keeping
    monkeypatch.setattr(Search, "keeping", lambda self, change: keeping(self, 30 * change))
    monkeypatch.setattr(spending, "_RUNS", 2)
    with pytest.raises(Verdict, match="the best of 2 compiles: give a looser bound, or no bound"):
        _compiled(source, tmp_path, max_kl=0.003, budget="400kb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [Verdict("output x is destroyed"), TooLarge(1 << 30, Amount(size=1), 1)])
def test_what_holds_stays_where_a_smaller_one_is_refused(
    source: Path, tmp_path: Path, error: UserError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is written by then: an error would say that nothing is."""
    check, calls = pipeline.check_saved, list[int]()
    _misprice(monkeypatch, 10)

    def checked(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise error
        check(*args)

    monkeypatch.setattr(pipeline, "check_saved", checked)
    report = _compiled(source, tmp_path, max_kl=0.03)
    assert len(calls) == 2
    assert len(_distances(report)) == 1
    assert report.compiled_bytes == sum(
        (tmp_path / name).stat().st_size for name in report.files if ".report." not in name
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_kl": 1e-9}, "max_kl 1e-09 does not hold: KL .* with the most bits for all weights"),
        ({"max_kl": 1e-3, "budget": "4bpw"}, "max_kl 0.001 does not hold: KL .* is what the budget of 4 bits a weight"),
        ({"max_kl": 1e-3, "budget": "112kb"}, "max_kl 0.001 does not hold: KL .* is what the budget of 0.112 MB all"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_told_and_nothing_written(
    source: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Verdict, match=message):
        _compiled(source, tmp_path, **fields)
    assert not list(tmp_path.iterdir())


def test_a_budget_and_a_bound_both_hold(source: Path, tmp_path: Path) -> None:
    report = _compiled(source, tmp_path, max_kl=0.05, budget="140kb")
    assert report.compiled_bytes <= 140_000
    assert min(_distances(report)) <= 0.05
    assert report.target[0].startswith("budget 0.14 MB and max_kl 0.05: ")


@pytest.mark.parametrize("evaluation", [None, _feeds(3, 40)])
def test_the_bound_is_judged_on_data_of_its_own(source: Path, evaluation: Any) -> None:
    """Neither calibrated on, nor what formats were chosen by, nor what the accuracy is told on."""
    prepared = prepare_model(source, Recipe(passes="gptq,pack"), Silent())
    judged = None if evaluation is None else Calibration(reader=evaluation)
    data = gather_data(prepared, Calibration(reader=_feeds(60)), evaluation=judged, aside=True, bound=True)
    held, _ = held_windows(prepared.plan, data)
    chosen, _ = check_windows(prepared.plan, data)
    parts = [
        {own.feeds["input_ids"].tobytes() for own in part} for part in (data.calibration, chosen, held, data.evaluation)
    ]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize(("kind", "lengths"), [("decoder", [32, 32]), ("encoder", [32, 16])])
def test_windows_of_a_text_are_used_for_one_thing_alone(tmp_path: Path, kind: str, lengths: list[int]) -> None:
    """No stretch of tokens is in two of them; and an encoder's bound is judged on texts of several lengths, too."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), 1024)
    (tmp_path / "t.txt").write_text("".join(map(chr, letters)))
    ir.save(tiny_decoder() if kind == "decoder" else tiny_encoder(), tmp_path / "m.onnx")
    tiny_tokenizer(256, tmp_path)
    prepared = prepare_model(tmp_path / "m.onnx", Recipe(passes="gptq,pack", samples=10, context=32), Silent())
    data = gather_data(prepared, Calibration([str(tmp_path / "t.txt")]), aside=True, bound=True)
    held, _ = held_windows(prepared.plan, data)
    chosen, _ = check_windows(prepared.plan, data)
    parts = [
        {
            tuple(own[i : i + 8])
            for batch in part
            for own in batch.feeds["input_ids"].tolist()
            for i in range(len(own) - 7)
        }
        for part in (data.calibration, chosen, held, data.evaluation)
    ]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert [own.feeds["input_ids"].shape[1] for own in held] == lengths


def test_too_little_data_is_told_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is judged on data that neither calibration nor the choice has seen"):
        _compiled(source, tmp_path, max_kl=0.1, calibration=_feeds(3))
    assert not list(tmp_path.iterdir())


def test_integer_nodes_keep_the_bound_by_floats(source: Path, tmp_path: Path) -> None:
    """Lists that make nodes integer have what they had: no format is chosen."""
    report = _compiled(source, tmp_path, passes="qdq(lm_head=static)", max_kl=1.0, min_coverage=0)
    assert report.mixed is not None
    assert report.frontier is None
