"""`qcompile explain`: every node of a compiled model, with all that was decided on it; bad reports in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main
from qcompile.compiler.report.explanation import explain
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A compiled decoder and its report."""
    folder = tmp_path_factory.mktemp("made")
    ir.save(tiny_decoder(), folder / "m.onnx")
    random = np.random.default_rng(0)
    feeds = [{"input_ids": random.integers(0, 256, (1, 64))} for _ in range(8)]
    recipe = Recipe(parse_passes("smooth,awq,gptq,pack"), group_size=32, exclude=("*layers.0.mlp.up*",), min_coverage=0)
    report = compile_model(folder / "m.onnx", recipe, output=folder / "o.onnx", calibration=feeds)
    return folder / "o.onnx", report


def test_every_node_has_what_every_pass_decided_on_it(made: tuple[Path, Report]) -> None:
    path, report = made
    found = {own.node: own for own in explain(path).nodes}
    assert list(found) == [own.node for own in report.decisions["pack"]]
    errors = {own.node: own.error for own in report.nodes}
    assert {name: own.error for name, own in found.items() if own.error is not None} == errors
    assert sum(own.share or 0.0 for own in found.values()) == pytest.approx(1)
    for name, decisions in report.decisions.items():
        for decision in decisions:
            for node in decision.detail.get("linears", [decision.node]):
                told = [(own.by, own.action, own.reason) for own in found[node].told] if node in found else []
                assert node not in found or (name, decision.action, decision.reason) in told
    assert found["model.layers.0.mlp.up_proj"].told[-1].reason == "excluded by '*layers.0.mlp.up*'"


def test_what_a_budget_chose_among_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each format with the size of the model from which on the frontier gives it; in order, and one of them chosen."""
    ir.save(tiny_decoder(), tmp_path / "m.onnx")
    feeds = [{"input_ids": np.random.default_rng(seed).integers(0, 256, (1, 32))} for seed in range(6)]
    out = tmp_path / "o.onnx"
    qcompile.compile(tmp_path / "m.onnx", "pack", budget="5bpw", calibration=feeds, output=out)
    frontier = json.loads((tmp_path / "o.report.json").read_text())["frontier"]
    point = frontier["points"][frontier["chosen"] - 1]
    for own in explain(out).nodes:
        (told,) = [told for told in own.told if told.by == "budget"]
        (unit,) = [number for number, names in enumerate(frontier["units"]) if own.weight in names]
        sizes = list(told.detail["sizes"].items())
        assert told.reason.startswith(point["formats"][unit])
        assert sizes == sorted(sizes, key=lambda item: item[1])
        assert sizes[0] == (frontier["points"][0]["formats"][unit], frontier["points"][0]["size"])
        assert told.detail["sizes"][point["formats"][unit]] <= point["size"]
    assert main(["explain", str(out), DOWN]) == 0
    assert " in models from " in capsys.readouterr().out


def test_candidates_are_told_with_their_errors(made: tuple[Path, Report]) -> None:
    """The least of them is the one that was chosen, or was not worth it."""
    judged = [told for own in explain(made[0]).nodes for told in own.told if told.candidates]
    assert judged
    for told in judged:
        assert all(loss > 0 for loss in told.candidates.values())
        if told.action == "folded":
            assert min(told.candidates, key=lambda label: told.candidates[label]) == told.reason


def test_a_candidate_that_was_no_number_comes_last(
    made: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strict JSON has null for it."""
    report = json.loads(made[0].with_name("o.report.json").read_text())
    detail = next(own["detail"] for name in report["decisions"] for own in report["decisions"][name]
                  if own["detail"].get("candidates"))  # fmt: skip
    detail["candidates"] = {"first": None, **detail["candidates"]}
    (tmp_path / "o.report.json").write_text(json.dumps(report))
    (tmp_path / "o.onnx").write_bytes(made[0].read_bytes())
    assert main(["explain", str(tmp_path / "o.onnx")]) == 0
    tried = [line for line in capsys.readouterr().out.splitlines() if "tried first" in line]
    assert tried
    assert all("inf" in line for line in tried)
    assert main(["explain", str(tmp_path / "o.onnx"), "--json"]) == 0
    found = [own for node in json.loads(capsys.readouterr().out)["nodes"] for own in node["told"]]
    assert any(own["candidates"].get("first", 0) is None for own in found)


def test_nodes_are_named_or_ranked(made: tuple[Path, Report]) -> None:
    path, report = made
    assert [own.node for own in explain(path, [f"{DOWN}.weight", DOWN]).nodes] == [DOWN]
    assert {own.node for own in explain(path, ["*down_proj"]).nodes} == {DOWN, DOWN.replace("1", "0")}
    worst = [own.node for own in explain(path, worst=3).nodes]
    assert worst == [own.node for own in sorted(report.nodes, key=lambda own: -own.error)[:3]]
    assert len(qcompile.explain(path.parent / "o.onnx", "*down_proj", worst=1).nodes) == 1


def test_the_command_prints_them(made: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(made[0]), DOWN]) == 0
    told = capsys.readouterr().out
    assert "quantized: uint4 g32 asym" in told or "quantized: int4 g32 asym" in told
    assert "% of all squared errors" in told
    assert main(["explain", str(made[0]), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["nodes"]) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "o.report.json is not there: the compile of o.onnx writes it"),
        ("{", "o.report.json cannot be read"),
        ("[]", "o.report.json is no report of a compile"),
        ("{}", "o.report.json is no report of a compile"),
        ('{"decisions": {"pack": [{"node": "a"}]}}', "o.report.json is no report of a compile"),
        ('{"decisions": {"pack": 3}, "nodes": [1]}', "o.report.json is no report of a compile"),
    ],
)
def test_a_bad_report_is_told(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "o.onnx").touch()
    if content is not None:
        (tmp_path / "o.report.json").write_text(content)
    with pytest.raises(UserError, match=message):
        explain(tmp_path / "o.onnx")


def test_an_error_that_is_no_number_is_the_worst(made: tuple[Path, Report], tmp_path: Path) -> None:
    """A report has null for it: a product that overflows."""
    plain = json.loads(made[0].with_name("o.report.json").read_text())
    plain["nodes"][3]["error"] = None
    (tmp_path / "o.onnx").touch()
    (tmp_path / "o.report.json").write_text(json.dumps(plain))
    first, second = explain(tmp_path / "o.onnx", worst=2).nodes
    assert (first.node, first.share) == (plain["nodes"][3]["node"], None)
    assert 0 < (second.share or 0) <= 1


def test_a_name_that_is_not_there_names_those_nearest(made: tuple[Path, Report]) -> None:
    with pytest.raises(UserError, match=r"'mlp.down' fits no node.*did you mean 'model.layers"):
        explain(made[0], ["mlp.down"])
    with pytest.raises(UserError, match="does not exist"):
        explain(made[0].with_name("absent.onnx"))
