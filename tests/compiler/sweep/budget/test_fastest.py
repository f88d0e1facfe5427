"""--fastest: the formats that take least time within a bound, by the times that a machine has."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.compiler.api.timing import time_products
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.report.advice import remedies
from qcompile.compiler.report.explanation import explain
from qcompile.compiler.report.frontier import frontier as drawing
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.report import Report
from qcompile.compiler.results.timings import FLOAT, Product, Timings
from qcompile.compiler.sweep.budget import fastest as fast
from qcompile.compiler.sweep.budget import stopwatch
from qcompile.compiler.sweep.budget.allocate import Option, keeping
from qcompile.compiler.sweep.budget.fastest import Speeds, fastest
from qcompile.models.tiny import tiny_encoder
from qcompile.passes.errors import UserError

PRICED = st.builds(
    lambda size, cost, time: (size, cost, time), st.integers(1, 20), st.integers(0, 50), st.integers(1, 9)
)
UNITS = st.lists(st.lists(PRICED, min_size=1, max_size=4), min_size=1, max_size=4)


def _feeds(count: int = 16, length: int = 32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 256, (1, length))} for _ in range(count)]


def _case(units: list[list[tuple[int, int, int]]]) -> tuple[list[list[Option[str]]], Speeds]:
    options = [[Option(str(i), size, cost) for i, (size, cost, _) in enumerate(unit)] for unit in units]
    times = [{str(i): float(time) for i, (_, _, time) in enumerate(unit)} for unit in units]
    return options, Speeds(Timings({}, "qcompile", 1, {}), times, 0.0)


@given(UNITS, st.integers(0, 100))
def test_the_cost_is_kept_and_no_choice_is_faster(units: list[list[tuple[int, int, int]]], cost: int) -> None:
    """By more than a thousandth, of those of no more cost."""
    options, speeds = _case(units)
    made = fastest(options, speeds, cost)
    every = [list(own) for own in itertools.product(*options)]
    holding = [own for own in every if sum(one.cost for one in own) <= cost]
    priced = fast.with_sizes(options, keeping(fast.by_time(options, speeds), cost))
    assert speeds.of(made) <= speeds.of(priced)
    assert sum(own.size for own in made) <= sum(own.size for own in priced)
    if not holding:
        assert sum(own.cost for own in made) == min(sum(one.cost for one in own) for own in every)
        return
    assert sum(own.cost for own in made) <= cost
    assert speeds.of(made) * 0.999 <= min(map(speeds.of, holding))


@given(UNITS, st.integers(0, 100), st.integers(1, 60))
def test_a_size_is_kept_where_the_smallest_choice_of_that_cost_has_it(
    units: list[list[tuple[int, int, int]]], cost: int, size: int
) -> None:
    options, speeds = _case(units)
    smallest, made = keeping(options, cost), fastest(options, speeds, cost, size)
    if sum(own.cost for own in smallest) <= cost:
        assert sum(own.cost for own in made) <= cost
    if sum(own.size for own in smallest) <= size:
        assert sum(own.size for own in made) <= size


def test_times_within_the_noise_are_the_same_and_bytes_decide() -> None:
    options = [[Option("large", 9, 1.0), Option("small", 4, 1.0), Option("slow", 2, 1.0)]]
    speeds = Speeds(Timings({}, "qcompile", 1, {}), [{"large": 100.0, "small": 102.0, "slow": 104.0}], 0.0)
    assert fastest(options, speeds, 1.0)[0].what == "small"


def _table(source: Path, monkeypatch: pytest.MonkeyPatch, price: Callable[[Product], float], **fields: Any) -> Timings:
    """What a machine has that takes so many microseconds for a product."""
    with monkeypatch.context() as own:
        own.setattr(stopwatch, "_measured", lambda products, *_: {product: price(product) for product in products})
        own.setattr(stopwatch, "_cache", lambda: None)
        return time_products(source, Recipe(**fields))


def _linear(product: Product) -> float:
    """Of a machine whose products take as long as their bits."""
    bits = 32.0 if product.format == FLOAT else float(product.format.split()[0].strip("intpars"))
    return product.k * product.n * bits / 1e3


@pytest.fixture
def written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(price: Callable[[Product], float] = _linear, **fields: Any) -> Path:
        file = tmp_path / "machine.json"
        file.write_text(_table(source, monkeypatch, price, **{"passes": "pack", **fields}).to_json())
        return file

    return write


def _frontier(report: Any) -> Frontier:
    assert report.frontier is not None
    return report.frontier  # type: ignore[no-any-return]


def _plan(source: Path, file: Path, **fields: Any) -> Any:
    given = {"max_kl": 0.03, "fastest": True, "calibration": _feeds(), **fields}
    return qcompile.dry_run(source, given.pop("passes", "pack"), for_machine=file, **given)


def _formats(plan: Any) -> set[str]:
    drawn = _frontier(plan)
    return {own.partition("(")[0] for own in drawn.points[drawn.chosen - 1].formats}


@pytest.mark.parametrize("slow", ["int3", "int4", "int8"])
def test_a_format_that_is_slow_there_is_not_chosen(source: Path, written: Callable[..., Path], slow: str) -> None:
    """Only what the machine says is another."""
    known = _formats(_plan(source, written(lambda own: 100.0 if own.format.startswith(slow) else 1.0)))
    quick = _formats(_plan(source, written(lambda own: 1.0 if own.format.startswith(slow) else 100.0), max_kl=5.0))
    assert slow not in known
    assert slow in quick


def test_points_go_by_time_and_each_has_its_speed(source: Path, written: Callable[..., Path]) -> None:
    drawn = _frontier(_plan(source, written()))
    assert drawn.fastest
    for quick, slow in itertools.pairwise(drawn.points):
        assert quick.microseconds is not None
        assert slow.microseconds is not None
        assert quick.microseconds < slow.microseconds
    own = drawn.points[0]
    assert drawn.speeds is not None
    units = zip(drawn.speeds.units, own.formats, strict=True)
    assert own.microseconds == pytest.approx(sum(times[name] for times, name in units))
    assert drawn.rows()[0][4] == f"{1e6 / own.microseconds:,.0f}"  # type: ignore[operator]
    assert drawn.heads[4] == "tokens/s"
    page = drawing(drawn)
    assert page.count("tokens/s") >= len(drawn.points)
    assert " µs</text>" in page


def test_a_machine_whose_time_goes_by_bytes_has_the_smallest_as_the_fastest(
    source: Path, written: Callable[..., Path]
) -> None:
    """As far as bits are all that bytes depend on: within the scales."""
    file = written(_linear, scale_bits=16)
    quick, small = (_frontier(_plan(source, file, fastest=own)) for own in (True, False))
    times = [own.points[own.chosen - 1].microseconds for own in (quick, small)]
    assert times[0] <= times[1] * 1.001  # type: ignore[operator]
    assert quick.points[quick.chosen - 1].size <= 1.05 * small.points[small.chosen - 1].size
    assert not small.fastest


def test_the_same_table_gives_the_same_bytes_that_keep_the_bound(
    source: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    file = written()
    made = [_compiled(source, tmp_path / name / "o.onnx", file) for name in "ab"]
    a, b = ((tmp_path / name / "o.onnx").read_bytes() for name in "ab")
    assert a == b
    drawn = _frontier(made[0])
    assert min(own.distance for own in drawn.tried) <= 0.03
    assert made[0].target[0].startswith("max_kl 0.03 and fastest: ")
    assert "products take" in made[0].target[0]
    assert Frontier.from_dict(json.loads((tmp_path / "a" / "o.report.json").read_text())["frontier"]) == drawn
    advised = remedies(made[0])
    assert advised
    for own in advised:
        assert f"--for-machine {file}" in own.command
        assert "--max-kl 0.03 --fastest" in own.command
    assert (tmp_path / "a" / "o.report.html").read_text().count("<title>compiled: ") == len(drawn.tried)
    shown = explain(tmp_path / "a" / "o.onnx", ["*layers.0*gate_proj*"]).sheet().text()
    assert "float takes " in shown
    assert "int4(group=64) takes " in shown


def _compiled(source: Path, output: Path, file: Path, **fields: Any) -> Report:
    given = {"max_kl": 0.03, "fastest": True, "for_machine": file, "calibration": _feeds(), **fields}
    output.parent.mkdir()
    return qcompile.compile(source, "pack", output=output, **given)


def test_a_budget_holds_beside_it(source: Path, written: Callable[..., Path]) -> None:
    """Of a machine on which large formats are the fastest."""
    file = written(lambda own: 1e5 / _linear(own))
    free, bounded = (_frontier(_plan(source, file, **own)) for own in ({}, {"budget": "135kb"}))
    assert free.points[free.chosen - 1].size > 135_000
    chosen = bounded.points[bounded.chosen - 1]
    assert 110_000 < chosen.size <= 135_000
    assert chosen.change <= 0.03
    assert chosen.microseconds > free.points[free.chosen - 1].microseconds  # type: ignore[operator]
    tight = _frontier(_plan(source, file, budget="5.4bpw"))
    assert tight.points[tight.chosen - 1].bits <= 5.4


def test_an_encoder_is_timed_with_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, names = np.random.default_rng(0), ("attention_mask", "token_type_ids")
    data = [
        {"input_ids": random.integers(0, 256, (1, 24)), **{name: np.ones((1, 24), np.int64) for name in names}}
        for _ in range(16)
    ]
    ir.save(tiny_encoder(), tmp_path / "m.onnx")
    table = _table(tmp_path / "m.onnx", monkeypatch, _linear, passes="pack")
    assert table.rows == 64
    (tmp_path / "t.json").write_text(table.to_json())
    drawn = _frontier(
        qcompile.dry_run(
            tmp_path / "m.onnx", "pack", min_sqnr=20.0, fastest=True, for_machine=tmp_path / "t.json", calibration=data
        )
    )
    assert drawn.rate_unit == "rows/s"


def test_formats_that_a_machine_has_no_time_of_are_not_chosen_and_gaps_are_told(
    source: Path, written: Callable[..., Path]
) -> None:
    file = written()
    table = Timings.from_dict(json.loads(file.read_text()))
    without = {own: time for own, time in table.times.items() if not own.format.startswith(("int3", "float"))}
    file.write_text(replace(table, times=without).to_json())
    plan = _plan(source, file, max_kl=5.0)
    assert "int3" not in _formats(plan)
    assert "in float" not in _frontier(plan).timed()
    gap = next(own for own in without if own.format == "int4 g64 asym")
    file.write_text(replace(table, times={own: time for own, time in table.times.items() if own != gap}).to_json())
    with pytest.raises(UserError, match=rf"machine\.json. lacks 1 of .* products: {gap}: measure them there"):
        _plan(source, file)
    file.write_text(replace(table, times={Product(3, 3, "int4 g64 asym"): 1.0}).to_json())
    with pytest.raises(
        UserError, match="has no time of any format that target qcompile offers for some products: measure"
    ):
        _plan(source, file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_kl": None}, "fastest is of formats within a bound: give max_kl in nats a token"),
        ({"max_kl": None, "budget": "4bpw"}, "fastest is of formats within a bound: give max_kl in nats a token"),
        ({"target": "qdq"}, r"machine\.json. is of target qcompile, and this compile is for qdq"),
        ({"max_kl": None, "fastest": False}, "tells of times where formats are chosen, and here are none"),
        ({"passes": "smooth,qdq"}, "here are none to choose: give .* with a list that has pack, or leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(
    source: Path, written: Callable[..., Path], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _plan(source, written(), **fields)


def test_a_file_of_settings_may_leave_the_bound_to_an_option(source: Path, written: Callable[..., Path]) -> None:
    recipe = Recipe.from_dict({"passes": ["pack"], "fastest": True})
    assert recipe.to_dict()["fastest"]
    plan = qcompile.dry_run(source, recipe=recipe, max_kl=0.5, for_machine=written(), calibration=_feeds())
    assert _frontier(plan).fastest
    with pytest.raises(UserError, match="fastest is of formats within a bound"):
        qcompile.dry_run(source, recipe=recipe)


def test_runtimes_that_are_not_here_are_asked_by_a_file_alone(source: Path) -> None:
    with pytest.raises(UserError, match=r"TensorRT, which is not here to be timed: give times of .* with for_machine="):
        qcompile.dry_run(
            source, "pack", target="tensorrt", max_kl=0.1, fastest=True, calibration=_feeds(), min_coverage=0
        )
