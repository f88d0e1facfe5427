"""compiler/mixed/sensitivity.py and its command: switches tell the truth, a bad node comes first, results are kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixing import BAD, bad_conv, bad_decoder, images
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.api.sensitivity import rank_nodes
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.calibration import spread, unseen
from qcompile.compiler.facts.model import versions
from qcompile.compiler.files.load import model_hash
from qcompile.compiler.mixed import sensitivity
from qcompile.compiler.mixed.if_nodes import ALL_FLOAT, Setting
from qcompile.compiler.mixed.keep import integer_pass
from qcompile.compiler.mixed.ranking import RankingCache
from qcompile.compiler.mixed.sensitivity import Mixture, finished_distances
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration, walk_model
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.base import Region, on_clone

QUICK = ["--samples", "4", "--context", "32"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _mixture(bench: Any, model: Any, passes: str, calibration: list[str] | None = None, **settings: Any) -> Mixture:
    source = bench.save(model)
    recipe = Recipe(**{"passes": parse_passes(passes), "samples": 4, "context": 32, "keep_worst": 1, **settings})
    walked = walk_model(source, recipe, Calibration(calibration or [str(bench.text)]), Silent(), checks=False)
    late = integer_pass(walked.passes)
    return Mixture(walked.model, late, walked.plan, walked.data, source, "cpu")


def _finished(mixture: Mixture, kept: list[str]) -> float:
    """The distance of the graph that the pass writes with these nodes kept, without any switch."""
    late, clone = on_clone(mixture.late, mixture.model)
    late.policy = replace(late.policy, kept=dict.fromkeys(kept, "kept"))  # type: ignore[attr-defined]
    late.call(Region.whole(clone))
    return finished_distances(mixture, clone)[0]


CASES = {
    "decoder": (lambda: bad_decoder(), "qdq(lm_head=static)", False),
    "smoothed": (lambda: tiny_decoder(layers=1), "smooth,qdq(lm_head=static)", False),
    "tied": (lambda: tiny_decoder(layers=1, outliers=False), "qdq(lm_head=static)", False),
    "all operators": (
        lambda: tiny_decoder(layers=1, outliers=False),
        "qdq(operators=all, observer=minmax, lm_head=static)",
        False,
    ),
    "with caches": (lambda: tiny_decoder(layers=1, kv_cache=True), "qdq(lm_head=static)", False),
    "dynamic": (lambda: bad_decoder(), "dynamic(lm_head=dynamic)", False),
    "encoder": (lambda: tiny_encoder(layers=1), "qdq(lm_head=static)", False),
    "convolutions": (lambda: bad_conv(), "qdq", True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_switched_graph_gives_what_the_finished_one_does(bench: Any, case: str) -> None:
    make, passes, images_needed = CASES[case]
    mixture = _mixture(bench, make(), passes, images(bench.folder) if images_needed else None)
    names = [site.node for site in mixture.sites]
    every = mixture.distance(mixture.without([]))
    assert mixture.distance(ALL_FLOAT) < 1e-3 * every
    rng = np.random.default_rng(1)
    for kept in ([], names[:1], names[-1:], list(rng.permutation(names)[: len(names) // 2])):
        told, real = mixture.distance(mixture.without(kept)), _finished(mixture, kept)
        assert real > 0
        # A Concat gives its inputs one scale, which they no longer share where it is kept in float.
        assert told == pytest.approx(real, rel=0.1 if case == "all operators" else 0.02), kept


def test_one_node_alone_is_what_keeping_all_others_gives(bench: Any) -> None:
    mixture = _mixture(bench, bad_decoder(), "qdq(lm_head=static)")
    others = [site.node for site in mixture.sites if site.node != BAD]
    alone = mixture.distance(Setting.of([BAD]))
    assert alone == pytest.approx(_finished(mixture, others), rel=0.02)
    assert alone == pytest.approx(mixture.distance(mixture.without(others)), rel=1e-6)


def test_the_planted_node_comes_first(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = bench.save(bad_decoder()), bench.folder / "ranking.json"
    options = ["--passes", "qdq(lm_head=static)", "--calibration", str(bench.text), "-o", str(out), *QUICK]
    assert cli.main(["sensitivity", str(source), *options]) == 0
    shown, ranking = capsys.readouterr().out, json.loads(out.read_text())
    nodes = ranking["nodes"]
    assert ranking["metric"] == "KL"
    assert nodes[0]["node"] == BAD
    assert nodes[0]["effect"] > 5 * nodes[1]["effect"], "it stands out"
    assert nodes[0]["weights"] == 64 * 256
    assert len(nodes) == 7 + 2, "the linears, the lm_head, the embedding"
    assert [n["effect"] for n in nodes] == sorted((n["effect"] for n in nodes), reverse=True)
    assert next(line for line in shown.splitlines() if line.startswith("1 ")).split()[1:4] == [BAD, "MatMul", "0.07"]
    assert "2 windows of 32 tokens beside the calibration data (4 windows of 32 tokens from text.txt)" in shown


def test_smoothing_heals_the_planted_node(bench: Any) -> None:
    """On 512 rows; on less than four a channel, 256 here, it levels single outliers."""
    effects = []
    for passes in ("qdq(lm_head=static)", "smooth,qdq(lm_head=static)"):
        ranking = _mixture(bench, bad_decoder(), passes, samples=16).rank(Silent())
        effects.append(next(node.effect for node in ranking.nodes if node.node == BAD))
    assert effects[1] < effects[0] / 10


def test_a_network_without_logits_is_ranked_by_its_outputs(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(bad_conv())
    files = images(bench.folder)
    assert cli.main(["sensitivity", str(source), "--passes", "qdq(lm_head=static)", "--calibration", *files]) == 0
    shown = capsys.readouterr().out
    first = next(line for line in shown.splitlines() if line.startswith("1 ")).split()
    assert first[1:3] == ["conv_1", "Conv"]
    assert float(first[4]) < 20, "in dB"
    assert "SQNR alone, dB" in shown
    assert "1 batches beside the calibration data (3 batches of " in shown
    assert "1 more held aside for choices" in shown


@pytest.mark.parametrize(("windows", "found"), [(4, 0), (5, 1), (6, 2), (20, 2), (0, 0)])
def test_check_windows_are_none_of_those_calibrated_on(windows: int, found: int) -> None:
    ids = list(range(32 * windows + 7))
    others, seen = unseen(ids, 32, 4, 2), spread(ids, 32, 4)
    assert len(others) == found
    starts = [int(window[0]) for window in (*others, *seen)]
    assert len(set(starts)) == len(starts)
    assert all(len(window) == 32 and window[0] % 32 == 0 for window in others)


def test_a_second_call_runs_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calibration = bench.save(bad_decoder()), Calibration([str(bench.text)])
    recipe = Recipe(parse_passes("qdq(lm_head=static)"), samples=4, context=32)
    first = rank_nodes(source, recipe, calibration=calibration)

    def walk(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the model was walked again")

    monkeypatch.setattr("qcompile.compiler.api.sensitivity.walk_model", walk)
    assert rank_nodes(source, recipe, calibration=calibration) == first
    changed = bench.save(bad_decoder(299.0), "other.onnx")
    more = Path(bench.folder / "more.txt")
    more.write_text(bench.text.read_text() + "More.")
    for args in (
        (changed, recipe, calibration),
        (source, Recipe(parse_passes("smooth,qdq(lm_head=static)"), samples=4, context=32), calibration),
        (source, Recipe(parse_passes("qdq(lm_head=static)"), samples=5, context=32), calibration),
        (source, recipe, Calibration([str(more)])),
    ):
        with pytest.raises(AssertionError, match="walked again"):
            rank_nodes(*args[:2], calibration=args[2])


def test_a_damaged_cache_is_measured_anew(bench: Any, cache: Path) -> None:
    source, calibration = bench.save(bad_decoder()), Calibration([str(bench.text)])
    recipe = Recipe(parse_passes("qdq(lm_head=static)"), samples=4, context=32)
    first = rank_nodes(source, recipe, calibration=calibration)
    (kept,) = (cache / "sensitivity").glob("*.json")
    kept.write_text('{"nodes": [{"node": "x"}]}')
    again = rank_nodes(source, recipe, calibration=calibration)
    assert again.nodes == first.nodes
    for content in ("{", "[]", '{"metric": "KL", "nodes": 1}'):
        kept.write_text(content)
        assert RankingCache(source, model_hash(source), recipe.to_dict(), versions(), calibration).get() is None


def test_rankings_on_what_the_model_samples_are_kept_too(bench: Any, cache: Path) -> None:
    """The word self is no file; a ranking on text is another one."""
    source, recipe = bench.save(bad_decoder()), Recipe(parse_passes("qdq(lm_head=static)"), samples=4, context=32)
    first = rank_nodes(source, recipe, calibration=["self"])
    assert rank_nodes(source, recipe, calibration=["self"]).seconds == first.seconds
    rank_nodes(source, recipe, calibration=bench.text)
    assert len(list((cache / "sensitivity").glob("*.json"))) == 2
    report = bench.compile(source, "qdq(lm_head=static)", calibration=["self"], keep_worst=1, samples=4, context=32)
    assert report.mixed is not None
    assert len(report.mixed.kept) == 1


@pytest.mark.parametrize("where", ["a file is in the way", "nobody has a home"])
def test_a_ranking_that_cannot_be_kept_is_not_lost(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    if where == "nobody has a home":
        monkeypatch.delenv("QCOMPILE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("~no such user").expanduser()))
    recipe = Recipe(parse_passes("qdq(lm_head=static)"), samples=4, context=32)
    assert rank_nodes(bench.save(bad_decoder()), recipe, calibration=bench.text).nodes
    assert "the ranking is not kept" in caplog.text
    assert "set QCOMPILE_CACHE" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passes", "smooth,pack"], "no pass of the list makes nodes integer: add qdq or dynamic"),
        (["--passes", "qdq(lm_head=static)", "--exclude", "*"], "'qdq' makes no node of this model integer"),
        (["--passes", "qdq(lm_head=static)", "-o", "in/model.onnx"], "is the input file"),
        (["--passes", "qdq(x=1)"], "has no parameter 'x'"),
    ],
)
def test_bad_input_is_told_in_a_line(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    source = bench.save(tiny_decoder())
    monkeypatch.chdir(bench.folder)
    embedding = ["--embedding", "keep"]
    assert cli.main(["sensitivity", str(source), *QUICK, "--calibration", str(bench.text), *embedding, *options]) == 2
    error = complaints(capsys.readouterr().err)
    assert error.count("\n") == 1
    assert message in error


def test_too_little_memory_is_told(bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sensitivity, "available", lambda: 1000)
    source = bench.save(tiny_decoder())
    assert cli.main(["sensitivity", str(source), *QUICK, "--calibration", str(bench.text)]) == 2
    assert "needs the float and the int8 weights in memory at once: about" in capsys.readouterr().err
