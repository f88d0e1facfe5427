"""compiler/sweep/run.py: figures, what is kept and not run again, rows with reasons, other models than decoders."""

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qcompile.compiler import stages
from qcompile.compiler.data.apart import repeated_rows
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.files import secret
from qcompile.compiler.files.cache import Cache
from qcompile.compiler.files.load import load_model
from qcompile.compiler.files.work import Work
from qcompile.compiler.measure.evaluate import evaluate
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.sweep import run as module
from qcompile.compiler.sweep.metric import Running, TextMetric
from qcompile.compiler.sweep.rows import DONE, FAILED, OPEN, REFUSED, SAME, Row, Sweep
from qcompile.compiler.sweep.run import sweep
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.compiler.walk import checkpoints
from qcompile.models.text import calibration_text
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_mlp
from qcompile.passes.errors import UserError

BASE = Recipe(passes=parse_passes("pack"), group_size=32, samples=4, context=32)
DECODER = partial(tiny_decoder, layers=1)
SCORED = Evaluation(context=32, tokens=128)
GRID = {"bits": [4, 8], "symmetric": [False, True], "passes": ["pack", "smooth,pack"]}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than tiny compiles; tests/compiler/sweep/test_plot.py and test_sweep_command.py draw."""
    monkeypatch.setattr(module, "write_plots", lambda *_: [])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs of all compiles that a sweep has begun."""
    begun: list[str] = []
    own = module.compile_model

    def counted(*arguments: Any, **named: Any) -> Any:
        begun.append(str(named["output"]))
        return own(*arguments, **named)

    monkeypatch.setattr(module, "compile_model", counted)
    return begun


def _sweep(bench: Any, model: Path, grid: Any = GRID, **named: Any) -> Sweep:
    given = {"recipe": BASE, "calibration": [str(bench.text)], "evaluation": SCORED, **named}
    return sweep(model, grid, output=bench.folder / "sweep", **given)


@pytest.fixture(scope="module")
def whole(make_bench: Callable[[str], Any]) -> tuple[Any, Path, Sweep]:
    """A sweep of eight combinations that nothing disturbed, its models kept."""
    bench = make_bench("whole")
    model = bench.save(DECODER())
    return bench, model, _sweep(bench, model, keep_models=True)


def test_rows_that_differ_behind_the_walk_are_walked_once(
    make_bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures and models are those of rows by themselves; nothing of the walks stays."""
    grid = {"attention": ["fused", "plain"], "passes": ["smooth,pack", "gptq,pack"], "bits": [4]}
    walked, others, after = list[int](), list[Path](), checkpoints.Checkpoints.after

    def counted(self: Any, state: Any, done: int, of: int, nodes: Any) -> None:
        walked.append(done)
        after(self, state, done, of, nodes)
        if self._work.shelf is not None:
            others.extend(self._work.shelf.parent.glob("*"))

    def swept(name: str) -> tuple[list[dict[str, Any]], dict[str, bytes], int]:
        bench = make_bench(name)
        walked.clear()
        result = _sweep(bench, bench.save(tiny_decoder(kv_cache=True)), grid, keep_models=True)
        folder = bench.folder / "sweep"
        assert not (folder / ".walks").exists()
        models = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("models/*/model*[xa]")}
        return [row.scores for row in result.done], models, len(walked)

    monkeypatch.setattr(checkpoints.Checkpoints, "after", counted)
    once = swept("once")
    with monkeypatch.context() as patched:
        patched.setattr(module._Job, "_alike", lambda *_: {})
        each = swept("each")
    assert once[:2] == each[:2]
    assert len(each[0]) == 4
    assert 2 * once[2] == each[2]
    assert not others, "rows of a walk come one after the other, and it is removed before the next one"


def test_walks_of_no_other_row_are_not_kept(whole: tuple[Any, Path, Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of that grid are read by the walk; a row that cannot be compiled is alike to none."""
    bench, model, _ = whole
    given = list[Any]()

    def refused(*_: Any, **named: Any) -> Any:
        given.append(named["checkpoints"])
        raise UserError("not here")

    monkeypatch.setattr(module, "compile_model", refused)
    sweep(model, GRID, output=bench.folder / "other", recipe=BASE, calibration=[str(bench.text)], evaluation=SCORED)
    assert len(given) == 6, "two are the same"
    assert set(given) == {None}


def test_figures_are_those_of_eval_and_of_the_report(whole: tuple[Any, Path, Sweep]) -> None:
    bench, model, result = whole
    folder = bench.folder / "sweep"
    windows = text_windows(
        folder / "text" / "evaluation.txt", load_tokenizer(model), input_plan(load_model(model)), 32, 128
    )
    for row in result.done:
        own = evaluate(folder / row.model, windows, reference=model)
        assert row.scores["kl"] == pytest.approx(own.kl, rel=1e-4)
        assert row.scores["kl_error"] == pytest.approx(own.kl_error, rel=1e-4)
        assert row.scores["perplexity"] == pytest.approx(own.perplexity, rel=1e-6)
        assert row.scores["agreement"] == own.agreement
        report = json.loads((folder / row.model).with_name("model.report.json").read_text())
        assert (row.bits_per_weight, row.compiled_bytes) == (report["bits_per_weight"], report["compiled_bytes"])
        assert report["recipe"]["passes"] == row.values["passes"].split(",")
    assert result.float_scores["perplexity"] == pytest.approx(evaluate(model, windows).perplexity, rel=1e-6)


def test_rows_that_make_the_same_model_are_not_run(whole: tuple[Any, Path, Sweep]) -> None:
    *_, result = whole
    assert [row.status for row in result.rows] == [DONE] * 4 + [DONE, DONE, SAME, SAME]
    assert result.rows[6].reason == "as int8 asymmetric pack: symmetric makes no difference there"
    assert len({row.key for row in result.done}) == 6


def test_files_hold_every_row(whole: tuple[Any, Path, Sweep]) -> None:
    bench, _, result = whole
    folder = bench.folder / "sweep"
    loaded = json.loads((folder / "results.json").read_text())
    assert [row["status"] for row in loaded["rows"]] == [row.status for row in result.rows]
    assert loaded["model_hash"] == result.model_hash
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    figures = [(float(line["bits_per_weight"]), float(line["kl"])) for line in lines[:6]]
    assert figures == sorted(figures)  # the table's order
    assert (folder / "table.md").read_text().count("\n| ") == 7  # the rule and six rows; the heads come first
    assert "held out of calibration" in (folder / "table.md").read_text()


def test_the_bundled_text_is_held_out(whole: tuple[Any, Path, Sweep]) -> None:
    bench, model, _ = whole
    text = bench.folder / "sweep" / "text"
    calibrated, scored = ((text / f"{name}.txt").read_text() for name in ("calibration", "evaluation"))
    assert calibrated + scored == calibration_text()
    assert len(scored) == pytest.approx(0.1 * len(calibration_text()), rel=0.05)
    result = _sweep(bench, model, {"passes": ["smooth,pack"]}, calibration=[])
    assert result.done[0].data == "4 windows of 32 tokens from most of the bundled text (speeches and a novel, English)"


def test_the_float_model_is_kept_only_while_rows_are_open(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []
    own = module.scoring.__globals__["Running"].subject
    monkeypatch.setattr(module.scoring.__globals__["Running"], "subject", lambda s, p: runs.append(p) or own(s, p))
    model = bench.save(DECODER())
    kept = bench.folder / "sweep" / "cache"
    first = _sweep(bench, model, {"bits": [4, 8]}, limit=1)
    assert [row.status for row in first.rows] == [DONE, OPEN]
    assert len(list(kept.glob("reference-*.npy"))) == 1
    _sweep(bench, model, {"bits": [4, 8]})
    assert list(kept.glob("reference-*.npy")) == []
    assert runs.count(model) == 1
    assert _sweep(bench, model, {"bits": [4, 8]}).float_scores == first.float_scores
    assert len(runs) == 1 + 2


def test_nothing_finished_runs_again(bench: Any, compiled: list[str]) -> None:
    model = bench.save(DECODER())
    first = _sweep(bench, model, {"bits": [4, 8]})
    assert len(compiled) == 2
    assert sorted(p.name for p in (bench.folder / "sweep").glob("*.onnx")) == []  # models are removed once scored
    again = _sweep(bench, model, {"bits": [8, 4], "seed": [0]})  # in another order, with a setting that is the default
    assert len(compiled) == 2
    assert [row.scores for row in again.rows] == [row.scores for row in reversed(first.rows)]
    _sweep(bench, model, {"bits": [4]}, evaluation=Evaluation(context=16, tokens=128))
    assert len(compiled) == 3, "another metric is another figure"
    bench.save(DECODER(seed=1))
    _sweep(bench, model, {"bits": [4]})
    assert len(compiled) == 4, "another model under the same name"


def test_calibration_is_known_by_its_content(bench: Any, compiled: list[str], tmp_path: Path) -> None:
    model, other = bench.save(DECODER()), tmp_path / "other.txt"
    other.write_text(bench.text.read_text()[:3000])
    grid = {"passes": ["pack", "smooth,pack"], "calibration": [str(bench.text), str(other)]}
    result = _sweep(bench, model, grid)
    assert [row.status for row in result.rows] == [DONE, SAME, DONE, DONE]
    assert "calibration makes no difference there" in result.rows[1].reason
    assert result.rows[2].scores != result.rows[3].scores
    other.write_text(bench.text.read_text()[3000:])
    _sweep(bench, model, grid)
    assert len(compiled) == 4


def test_an_interrupted_sweep_goes_on(bench: Any, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench.save(DECODER())
    own, grid = module.compile_model, {"bits": [4, 8], "symmetric": [False, True]}

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if len(compiled) == 2:
            raise KeyboardInterrupt
        return own(*arguments, **named)

    monkeypatch.setattr(module, "compile_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _sweep(bench, model, grid)
    folder = bench.folder / "sweep"
    states = [row["status"] for row in json.loads((folder / "results.json").read_text())["rows"]]
    assert states == [DONE, DONE, OPEN, SAME]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr(module, "compile_model", own)
    assert len(_sweep(bench, model, grid).done) == 3
    assert len(compiled) == 3


def test_refused_rows_leave_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose model is no good is not compiled again, so nobody goes on behind its checkpoints."""
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints, "_SHARE", float("inf"))
    monkeypatch.setattr(secret, "cache_dir", lambda: bench.folder / "caches")
    keep, kept = Work.keep, list[int]()
    monkeypatch.setattr(Work, "keep", lambda work, *told: (kept.append(told[1]), keep(work, *told)))
    grid = {"min_cosine": [0.5, 1.0]}
    rows = _sweep(bench, bench.save(tiny_decoder(layers=2)), grid, keep_models=True).rows
    assert [row.status for row in rows] == [DONE, REFUSED]
    assert "min-cosine" in rows[1].reason
    assert len(kept) > 2, "both had checkpoints"
    assert [folder.name for folder in (bench.folder / "sweep" / "models").iterdir()] == [rows[0].key]
    assert not list((bench.folder / "sweep").rglob("*.work.tmp"))


def test_what_cannot_be_compiled_is_a_row(bench: Any, compiled: list[str]) -> None:
    model = bench.save(DECODER())
    grid = {"target": ["qcompile", "matmulnbits"], "group_size": [32, 24]}
    rows = {tuple(row.values.values()): row for row in _sweep(bench, model, grid).rows}
    refused = rows["matmulnbits", "24"]
    assert (refused.status, refused.scores) == (REFUSED, {})
    assert "24" in refused.reason
    assert [row.status for row in rows.values()].count(DONE) == 3
    count = len(compiled)
    _sweep(bench, model, grid)
    assert len(compiled) == count, "a refusal is known, too"


def test_a_bug_is_a_row_that_is_tried_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench.save(DECODER())
    own = module.compile_model

    def broken(source: Any, recipe: Recipe, **named: Any) -> Any:
        if recipe.bits == 8:
            raise RuntimeError("two\nlines")
        return own(source, recipe, **named)

    monkeypatch.setattr(module, "compile_model", broken)
    rows = _sweep(bench, model, {"bits": [8, 4]}).rows
    assert [(row.status, row.reason) for row in rows] == [(FAILED, "RuntimeError: two lines"), (DONE, "")]
    monkeypatch.setattr(module, "compile_model", own)
    assert [row.status for row in _sweep(bench, model, {"bits": [8, 4]}).rows] == [DONE, DONE]


@pytest.mark.parametrize("cause", [MemoryError(), OSError()])
def test_too_little_memory_or_disk_is_of_the_moment(
    cause: Exception, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise UserError("1 MB are free") from cause

    model = bench.save(DECODER())
    with monkeypatch.context() as patched:
        patched.setattr(stages, "check_fits", full)
        assert [row.status for row in _sweep(bench, model, {"bits": [4]}).rows] == [FAILED]
    assert [row.status for row in _sweep(bench, model, {"bits": [4]}).rows] == [DONE]


def test_encoders_are_scored_by_their_outputs(bench: Any) -> None:
    result = _sweep(bench, bench.save(tiny_encoder()), {"bits": [4, 8]})
    four, eight = (row.scores for row in result.rows)
    assert 0.01 < four["relative_error"] < 0.5
    assert eight["relative_error"] < four["relative_error"] / 5  # 16 times finer, but for int8 activations
    assert four["sqnr"] == pytest.approx(-20 * math.log10(four["relative_error"]))
    assert four["cosine"] < eight["cosine"] <= 1


def test_models_without_tokens_take_arrays(bench: Any, tmp_path: Path) -> None:
    model = bench.save(tiny_mlp(), tokenizer=False)
    rng = np.random.default_rng(0)
    for name in ("calibrated", "scored"):
        np.savez(tmp_path / name, x=rng.normal(size=(8, 48)).astype(np.float32))
    grid = {"passes": ["pack", "gptq,pack"]}
    named = {"calibration": [str(tmp_path / "calibrated.npz")]}
    with pytest.raises(UserError, match=r"cannot be fed from text: give inputs to score it on with --data"):
        _sweep(bench, model, grid, **named)
    result = _sweep(bench, model, grid, evaluation=Evaluation(data=[tmp_path / "scored.npz"]), **named)
    assert [row.status for row in result.rows] == [DONE, DONE]
    with pytest.raises(UserError, match=r"calibrated\.npz is calibrated on and scored on"):
        _sweep(bench, model, grid, evaluation=Evaluation(data=[tmp_path / "calibrated.npz"]), **named)
    rows = [np.load(tmp_path / f"{name}.npz")["x"] for name in ("calibrated", "scored")]
    np.savez(tmp_path / "both", x=np.concatenate([rows[1], rows[0][:3]]))
    with pytest.raises(UserError, match=r"^3 of 11 rows that models are scored on are in the calibration data .*npz: "):
        _sweep(bench, model, grid, evaluation=Evaluation(data=[tmp_path / "both.npz"]), **named)


def test_what_calibrates_best(bench: Any, tmp_path: Path) -> None:
    """The bundled text, a text of the user's, and both, judged on what none of them has."""
    model, code = bench.save(DECODER()), tmp_path / "code.txt"
    (tmp_path / "more.txt").write_text("".join(f"while (i < {i}) {{ total += row[i++]; }}\n" for i in range(900, 990)))
    code.write_text("".join(f"for (int i = 0; i < {i}; ++i) sum += values[{i}];\n" for i in range(400)))
    grid = {"calibration": ["general", code, ["general", code]], "passes": ["smooth,pack"]}
    scored = Evaluation([Path("general"), tmp_path / "more.txt"], context=300, tokens=900)
    result = _sweep(bench, model, grid, calibration=[], evaluation=scored)
    assert [row.status for row in result.rows] == [DONE] * 3
    assert [row.values["calibration"] for row in result.rows] == ["general", str(code), f"general+{code}"]
    assert result.rows[1].data == "4 windows of 32 tokens from code.txt"
    assert result.rows[2].data.endswith("(speeches and a novel, English) mixed with code.txt")
    assert len({row.scores["kl"] for row in result.rows}) == 3
    for row in result.rows:
        each = [row.scores[f"kl {name}"] for name in ("general", "more.txt")]
        assert row.scores["kl"] == pytest.approx(sum(each) / 2, rel=1e-6)
        assert each[0] != pytest.approx(each[1], rel=1e-3)
    assert "| KL general | ± general | KL more.txt | ± more.txt |" in (bench.folder / "sweep" / "table.md").read_text()


@pytest.mark.parametrize("given", ["general", "copy.txt", "copy.txt+general"])
@pytest.mark.parametrize("scored", ["scored.txt", "scored.jsonl"])
def test_what_is_scored_is_not_calibrated_on_under_another_name(
    bench: Any, tmp_path: Path, given: str, scored: str
) -> None:
    """A text whose second half is in the calibration data, in other lines."""
    model, own = bench.save(DECODER()), calibration_text()[20_000:24_000]
    (tmp_path / "copy.txt").write_text(calibration_text()[18_000:25_000])
    text = "another tale of other whales and ships\n" * 100 + own.replace("\n", "  \n")
    lines = [json.dumps({"text": line}) for line in text.split("\n") if line.strip()]
    (tmp_path / scored).write_text("\n".join(lines) if scored.endswith(".jsonl") else text)
    grid = {"calibration": [[tmp_path / word if word != "general" else word for word in given.split("+")], "self"]}
    told = r"^\d\d% of what models are scored on of scored\.(txt|jsonl) is in the calibration data"
    with pytest.raises(UserError, match=told):
        _sweep(bench, model, grid, evaluation=Evaluation([tmp_path / scored], context=32, tokens=0))
    assert not (bench.folder / "sweep" / "cache").exists()


def test_of_a_long_text_that_counts_which_is_scored(bench: Any, tmp_path: Path) -> None:
    """The calibration data is a fiftieth of the text, and all that models are scored on; or what none is scored on."""
    model, text = bench.save(DECODER()), calibration_text()[:50_000]
    (tmp_path / "scored.txt").write_text(text)
    scored = Evaluation([tmp_path / "scored.txt"], context=32, tokens=128)
    (tmp_path / "beginning.txt").write_text(text[:1000])
    with pytest.raises(UserError, match=r"^100% of what models are scored on of scored\.txt is in"):
        _sweep(bench, model, {"passes": ["smooth,pack"]}, calibration=[tmp_path / "beginning.txt"], evaluation=scored)
    (tmp_path / "rest.txt").write_text(text[10_000:])
    rest = _sweep(bench, model, {"passes": ["smooth,pack"]}, calibration=[tmp_path / "rest.txt"], evaluation=scored)
    assert [row.status for row in rest.rows] == [DONE]


def test_strings_are_rows_too() -> None:
    """Of an input of one dimension each row is a str, which was taken for an array."""
    scored = [Batch({"text": np.array(["a", "b", "c"], object), "x": np.arange(3)}, 3)]
    others = [Batch({"text": np.array(["c", "b"], object), "x": np.array([2, 2])}, 2)]
    assert repeated_rows(scored, others) == 1


class _Cut(Running):
    """Models that give logits of whole pieces of five tokens alone; the second one of every text is another one."""

    def subject(self, path: Path) -> Any:
        def logits(window: Any) -> Any:
            own = np.random.default_rng(int(window[0])).normal(size=(len(window) // 5 * 5, 7)).astype(np.float32)
            return own if path.name == "float" else own * (1.5 if window[0] else 1.1)

        return SimpleNamespace(logits=logits)


def test_each_text_has_its_own_tokens(tmp_path: Path) -> None:
    """Where a graph of fixed length leaves out the end of each window, too."""
    texts = {name: [np.full(12, number) for _ in range(3)] for number, name in enumerate(("a.txt", "b.txt"))}
    alone = {}
    for name, windows in texts.items():
        metric = TextMetric(tmp_path / "float", {name: windows}, _Cut(), tmp_path, name)
        metric.prepare(lambda *_: None)
        alone[name] = metric.score(tmp_path / "coded", lambda *_: None)
    metric = TextMetric(tmp_path / "float", texts, _Cut(), tmp_path, "both")
    metric.prepare(lambda *_: None)
    both = metric.score(tmp_path / "coded", lambda *_: None)
    for name in texts:
        assert both[f"kl {name}"] == pytest.approx(alone[name]["kl"], rel=1e-12)
        assert both[f"kl_error {name}"] == pytest.approx(alone[name]["kl_error"], rel=1e-12)
    assert both["kl b.txt"] > 2 * both["kl a.txt"]


def test_the_pareto_front() -> None:
    points = [(4.0, 0.3), (4.5, 0.1), (4.5, 0.2), (5.0, 0.1), (8.0, 0.01), (9.0, math.nan), (None, 0.001)]
    rows = [
        Row(i, {"seed": str(i)}, status=DONE, bits_per_weight=bits, scores={"kl": kl})
        for i, (bits, kl) in enumerate(points)
    ]
    made = Sweep("m", "", {}, {}, "kl", "KL", "", "", [*rows, Row(9, {"seed": "9"})])
    made.mark_pareto()
    assert [row.pareto for row in made.rows] == [True, True, False, False, True, False, False, False]


def test_a_torn_cache_file_counts_as_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.put("a", {"status": DONE, "scores": {"kl": 0.5}})
    assert cache.get("a") == {"status": DONE, "scores": {"kl": 0.5}}
    for content in ("", '{"status": "do', "[]"):
        (tmp_path / "cache" / "a.json").write_text(content)
        assert cache.get("a") is None
    assert cache.get("b") is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.json"]


def test_ranges_of_other_data_are_another_row(bench: Any, compiled: list[str]) -> None:
    """qdq reads the data without statistics: neither a row of this run nor one on disk may stand for another text."""
    other = bench.folder / "other.txt"
    model = bench.save(DECODER())
    other.write_text(calibration_text()[6000:9000], encoding="utf-8")
    grid = {"passes": ["qdq"], "calibration": [str(bench.text), str(other)]}
    assert [row.status for row in _sweep(bench, model, grid).rows] == [DONE, DONE]
    assert len(compiled) == 2
    _sweep(bench, model, grid)
    assert len(compiled) == 2
