"""The frontier that a budget draws: every point of it can be had again, for its own model and target."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.compiler import cli
from qcompile.compiler.report.advice import remedies
from qcompile.compiler.report.frontier import frontier as drawing
from qcompile.compiler.results.frontier import Frontier, Point
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder
from qcompile.passes.errors import UserError


def _feeds(count: int = 8, length: int = 32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 256, (1, length))} for _ in range(count)]


@pytest.fixture(scope="module")
def drawn(source: Path) -> Report:
    return qcompile.compile(source, "pack", output=source.parent / "o.onnx", calibration=_feeds(), budget="120kb")


def _formats(report: Path) -> list[tuple[str, str, Any]]:
    """Of every node, by the file of a report."""
    return [(own["node"], own["format"], own["detail"]) for own in json.loads(report.read_text())["decisions"]["pack"]]


def _frontier(report: Report) -> Frontier:
    assert report.frontier is not None
    return report.frontier


def test_larger_points_change_less_and_the_chosen_one_is_the_file(drawn: Report) -> None:
    points = _frontier(drawn).points
    assert 8 <= len(points) <= 12
    for small, large in itertools.pairwise(points):
        assert small.size < large.size
        assert small.bits < large.bits
        assert small.change > large.change
    chosen = points[_frontier(drawn).chosen - 1]
    assert chosen.size == drawn.compiled_bytes
    assert chosen.bits == pytest.approx(drawn.bits_per_weight, abs=0.3)  # that of all products, without the lookup


def test_a_point_is_compiled_from_the_report(source: Path, drawn: Report, tmp_path: Path) -> None:
    for number in (1, len(_frontier(drawn).points)):
        report = qcompile.compile(
            source, output=tmp_path / "p.onnx", calibration=_feeds(), budget_file=source.parent / "o.report.json",
            point=number,
        )  # fmt: skip
        wanted = dict(zip(_frontier(drawn).units, _frontier(drawn).points[number - 1].formats, strict=True))
        made = {own.detail["weight"]: own.format for own in report.decisions["pack"]}
        for names, form in wanted.items():
            assert {made[name] for name in names if name in made} <= {form.partition("(")[0]}
        assert report.compiled_bytes == pytest.approx(_frontier(drawn).points[number - 1].size, abs=16_000)
        assert _frontier(report) == replace(_frontier(drawn), chosen=number).sized(report.compiled_bytes)
        for own in remedies(report):
            assert f"p.report.json --point {number}" in own.command
            assert "--weights-of" not in own.command


def test_the_same_settings_may_be_changed_but_not_the_model_or_the_target(
    source: Path, drawn: Report, tmp_path: Path
) -> None:
    file = source.parent / "o.report.json"
    given: dict[str, Any] = {"output": tmp_path / "p.onnx", "calibration": _feeds(), "budget_file": file}
    assert qcompile.compile(source, "smooth,pack", point=2, **given).recipe["passes"] == ["smooth", "pack"]
    (tmp_path / "p.onnx").unlink()
    ir.save(tiny_decoder(seed=1), tmp_path / "other.onnx")
    for model, fields, message in (
        (tmp_path / "other.onnx", {"point": 2}, "the frontier is of another model than"),
        (source, {"point": 2, "target": "qdq"}, "target qdq: the points of .* are for target qcompile"),
        (source, {"point": 0}, "point 0 is not there: the frontier has points 1 to"),
        (source, {"point": 99}, "point 99 is not there"),
        (source, {}, "has points 1 to .*: choose one with point="),
        (source, {"point": 2, "budget": "4bpw"}, "budget chooses formats, and so does budget_file"),
        (source, {"point": 2, "recipe": qcompile.Recipe()}, "budget_file= has the settings of its compile"),
    ):
        with pytest.raises(UserError, match=message):
            qcompile.compile(model, **{**given, **fields})  # type: ignore[arg-type]
        assert not (tmp_path / "p.onnx").exists()
        with pytest.raises(UserError, match=message):
            qcompile.dry_run(model, budget_file=file, **fields)  # type: ignore[arg-type]
    assert qcompile.dry_run(source, budget_file=file, point=2, fastest=False, max_kl=None).frontier is not None
    with pytest.raises(UserError, match="point= is one of budget_file="):
        qcompile.compile(source, point=2, output=tmp_path / "p.onnx")


def test_settings_of_formats_have_no_effect_on_a_point(source: Path, drawn: Report, tmp_path: Path) -> None:
    file = source.parent / "o.report.json"
    given: dict[str, Any] = {"calibration": _feeds(), "budget_file": file, "point": 2}
    qcompile.compile(source, output=tmp_path / "p.onnx", **given)
    for name, value in (("bits", 8), ("group_size", 32), ("symmetric", True), ("weights", "nf4")):
        with pytest.warns(UserWarning, match=f"{name} has no effect here: the point has the formats"):
            qcompile.compile(source, output=tmp_path / "q.onnx", **given, **{name: value})
        plain, other = (_formats(tmp_path / f"{stem}.report.json") for stem in "pq")
        assert other == plain


def test_what_formats_were_chosen_by_is_no_test_data(source: Path, tmp_path: Path) -> None:
    """Of a point neither, whatever it is calibrated on; and its report says so to whoever scores it later."""
    for name, seed in (("a", 1), ("b", 2)):
        ids = np.random.default_rng(seed).integers(0, 256, (8, 32))
        np.savez(tmp_path / f"{name}.npz", input_ids=ids)
    a, b = ([str(tmp_path / f"{name}.npz")] for name in "ab")
    qcompile.compile(source, "pack", output=tmp_path / "o.onnx", calibration=a, budget="4bpw")
    given: dict[str, Any] = {"calibration": b, "budget_file": tmp_path / "o.report.json", "point": 2}
    with pytest.raises(UserError, match=r"a\.npz is no test data: it is calibrated on, too"):
        qcompile.compile(source, output=tmp_path / "p.onnx", evaluation=a, **given)
    assert not (tmp_path / "p.onnx").exists()
    report = qcompile.compile(source, output=tmp_path / "p.onnx", **given)
    assert sorted(report.calibrated.values()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": 3}, {"recipe": []}, {"source_hash": 3}, {"calibrated": []}, {"tried": [{}]},
        {"points": [{"size": "x", "bits": 1, "change": 1, "formats": []}], "units": []},
        {"points": [{"size": 1, "bits": 1, "change": None, "formats": []}], "units": []},
        {"points": [{"size": 1, "bits": 1, "change": 1, "formats": [3]}], "units": [["a"]]},
    ],
)  # fmt: skip
def test_a_damaged_frontier_is_told_in_a_line(
    source: Path, drawn: Report, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"frontier": {**_frontier(drawn).to_dict(), **wrong}}))
    with pytest.raises(UserError, match="has a frontier of another version"):
        qcompile.dry_run(source, budget_file=tmp_path / "f.json", point=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has no frontier"),
        ("{}", "has no frontier"),
        ('{"frontier": null}', "has no frontier"),
        ('{"frontier": {"points": 3}}', "has a frontier of another version"),
        ('{"frontier": {"points": [], "units": [], "tried": []}}', "has a frontier of another version"),
        ('{"frontier": []}', "has a frontier of another version"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_told_in_a_line(source: Path, tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "f.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        qcompile.dry_run(source, budget_file=file, point=1)


def test_a_dry_run_draws_it_and_writes_nothing(
    source: Path, drawn: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its document is a file of points, too."""
    plan = qcompile.dry_run(source, "pack", calibration=_feeds(), budget="120kb")
    assert plan.frontier is not None
    assert plan.frontier.sized(drawn.compiled_bytes) == drawn.frontier
    assert plan.report.compiled_bytes == pytest.approx(drawn.compiled_bytes, abs=16_000)
    for number, own in enumerate(_feeds()):
        np.savez(tmp_path / f"{number}.npz", **own)
    files = [str(tmp_path / f"{number}.npz") for number in range(8)]
    before = sorted(tmp_path.iterdir())
    options = ["--passes", "pack", "--budget", "120kb", "--dry-run", "--calibration", *files]
    assert cli.main([str(source), *options]) == 0
    shown = capsys.readouterr().out
    assert "bits a weight" in shown
    assert "chosen" in shown
    assert cli.main([str(source), *options, "--json"]) == 0
    document = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "plan.json").write_text(document)
    own = qcompile.dry_run(source, budget_file=tmp_path / "plan.json", point=3)
    assert own.frontier is not None
    assert own.frontier.points == Frontier.from_dict(json.loads(document)["frontier"]).points
    assert own.frontier.chosen == 3


@pytest.mark.parametrize("kind", ["encoder", "conv"])
def test_other_models_have_decibels(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    if kind == "encoder":
        model, names = tiny_encoder(), ("attention_mask", "token_type_ids")
        data = [
            {"input_ids": random.integers(0, 256, (1, 24)), **{name: np.ones((1, 24), np.int64) for name in names}}
            for _ in range(8)
        ]
    else:
        model, data = tiny_conv(), [{"image": random.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(8)]
    ir.save(model, tmp_path / "m.onnx")
    plan = qcompile.dry_run(tmp_path / "m.onnx", "pack", calibration=data, budget="6bpw", min_coverage=0)  # type: ignore[arg-type]
    assert plan.frontier is not None
    assert plan.frontier.unit == "SQNR, dB"
    figures = [float(row[3]) for row in plan.frontier.rows()]
    assert figures == sorted(figures)
    assert len(set(figures)) == len(figures) > 1


def test_the_page_draws_it(drawn: Report) -> None:
    page = drawing(_frontier(drawn))
    assert page.count("<title>point ") == len(_frontier(drawn).points)
    assert page.count('class="taken"') == 1
    assert "chosen" in page


_numbers = st.floats(1e-6, 1e6, allow_nan=False)


@given(
    st.lists(st.tuples(st.integers(1, 10**9), _numbers, _numbers), min_size=1, max_size=5),
    st.sampled_from(["KL", "SQNR"]),
)
def test_it_comes_back_from_json(values: list[tuple[int, float, float]], metric: str) -> None:
    points = tuple(Point(size, bits, change, ("int4(group=64)",)) for size, bits, change in values)
    made = Frontier(metric, "2 windows", (("a", 'b"="'),), points, 1, {"passes": ["pack"]}, "0" * 64)
    made = made.with_tried(10, 0.1, "max_kl 0.1", "2 windows")
    assert Frontier.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert drawing(made)
