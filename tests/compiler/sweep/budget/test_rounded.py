"""What each weight is measured by: the list's own rounding at three bits, where it has one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.mixed import sensitivity
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.settings.bound import NO_BOUND
from qcompile.compiler.settings.steps import Step
from qcompile.compiler.stages import Prepared, gather_data, prepare_model
from qcompile.compiler.sweep.budget import prices
from qcompile.compiler.sweep.budget.choose import chosen_of
from qcompile.compiler.sweep.budget.effects import measured, probed
from qcompile.compiler.sweep.budget.prices import measuring
from qcompile.compiler.sweep.budget.rounded import NEAREST, PROBE, Probe, rounded_by, rounding_of
from qcompile.compiler.sweep.budget.units import Unit
from qcompile.passes.errors import UserError
from qcompile.passes.formats.hadamard import HADAMARD
from qcompile.passes.linears import Linear, constant
from qcompile.passes.rotation import Rotation
from qcompile.passes.rounding import round_to_nearest

LISTS = ("gptq,pack", "rotate(judge=false),gptq,pack", "smooth,awq,rotate(judge=false),gptq,pack")


def _feeds(count: int = 16, length: int = 64) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 256, (1, length))} for _ in range(count)]


def _prepared(source: Path, recipe: Recipe) -> tuple[Prepared, list[Unit]]:
    prepared = prepare_model(source, measuring(recipe), Silent())
    return prepared, chosen_of(prepared.model, recipe)[0]


def _rounded(source: Path, passes: str, **given: Any) -> tuple[Prepared, list[Unit], Probe]:
    recipe = Recipe(passes=passes, **given)
    prepared, units = _prepared(source, recipe)
    return (
        prepared,
        units,
        rounded_by(prepared, units, recipe, Calibration(reader=_feeds()), None, Silent(), bound=False),
    )


def _products(units: Sequence[Unit]) -> list[Linear]:
    """Those that share no table."""
    return [own for unit in units if not unit.embeddings for own in unit.linears]


@pytest.mark.parametrize("passes", LISTS)
def test_products_are_rounded_by_the_list_and_their_weights_stand_where_they_stood(source: Path, passes: str) -> None:
    """Turned back where their input was turned: else they would be 1.4 times as far from the weight as zeros. All but
    one at most, of which rows held aside may not confirm that error compensation gains anything.
    """
    _, units, probe = _rounded(source, passes)
    products = _products(units)
    assert len(products) - 1 <= len(probe.known) <= len(products)
    for own in products:
        if own.name in probe.known:
            assert (probe.known[own.name].rotation is not None) == ("rotate" in passes)
        w, made = own.read(), probe.of(own)
        assert made.shape == w.shape
        assert np.linalg.norm(made - w) < 0.8 * np.linalg.norm(w)


def test_what_all_change_is_less_than_by_nearest_rounding(source: Path) -> None:
    prepared, units, probe = _rounded(source, "gptq,pack")
    data = gather_data(prepared, Calibration(reader=_feeds()), aside=True)
    made, plain = (measured(prepared, data, units, Silent(), own) for own in (probe, NEAREST))
    products = {own.names_of_weights[0] for own in units if not own.embeddings}
    sums = [sum(node.effect for node in own.nodes if node.node in products) for own in (made, plain)]
    assert 0 < sums[0] < 0.9 * sums[1]


def test_lists_without_such_rounding_round_to_nearest_behind_their_rotation(source: Path) -> None:
    for passes, turned in (("pack", False), ("smooth,awq,pack", False), ("rotate,pack", True)):
        _, units, probe = _rounded(source, passes)
        assert not probe.known
        for own in _products(units):
            w, rotation = own.read(), Rotation.of(own.shape[0], 0)
            assert rotation is not None
            wanted = round_to_nearest(rotation.rows(w) if turned else w, PROBE, None).dequantize()
            np.testing.assert_allclose(probe.of(own), rotation.rows_before(wanted) if turned else wanted, atol=1e-6)


def test_a_table_and_the_head_that_shares_it_are_rounded_to_nearest(source: Path) -> None:
    prepared, units, probe = _rounded(source, "rotate(judge=false),gptq,pack")
    (tied,) = (own for own in units if own.embeddings)
    made = {str(value.name): value for value in probed(prepared.model, units, probe).graph.initializers.values()}
    table = np.asarray(constant(tied.embeddings[0].table).numpy(), np.float32)
    wanted = round_to_nearest(np.ascontiguousarray(table.T), PROBE, None).dequantize().T
    found = [value for name, value in made.items() if ".probed." in name and "embed" in name]
    assert found
    for value in found:
        own = np.asarray(constant(value).numpy())
        np.testing.assert_allclose(own if own.shape == wanted.shape else own.T, wanted, atol=1e-6)


def test_steps_that_round_are_those_that_rotate_and_choose_codes() -> None:
    """As they are given, but for refinements."""
    told = rounding_of(Recipe(passes="smooth,awq,rotate(judge=false),gptq(damping=held,sweeps=9),pack"))
    quick = {"damping": "held", "sweeps": 0, "refit": False}
    assert told == (Step("rotate", {"judge": False}), Step("gptq", quick))
    assert rounding_of(Recipe(passes="smooth,awq,rotate,pack")) == ()


def test_what_measures_leaves_the_model_as_it_was(source: Path) -> None:
    recipe = Recipe(passes=LISTS[1])
    prepared, units = _prepared(source, recipe)
    before = {name: value.const_value for name, value in prepared.model.graph.initializers.items()}
    rounded_by(prepared, units, recipe, Calibration(reader=_feeds()), None, Silent(), bound=False)
    assert {name: value.const_value for name, value in prepared.model.graph.initializers.items()} == before
    producers = [own.activation.producer() for own in _products(units)]
    assert producers
    assert all(node is None or node.op_type != HADAMARD for node in producers)


@pytest.mark.parametrize("passes", ["rotate(judge=false),pack", "rotate(judge=false),gptq,pack"])
def test_budgets_below_three_bits_are_for_pairs_of_turned_products(source: Path, tmp_path: Path, passes: str) -> None:
    given: dict[str, Any] = {"calibration": _feeds(), "budget": "2.6bpw", "scale_bits": 16}
    kept: dict[str, Any] = {"lm_head": "keep", "embedding": "keep", "min_coverage": 0}
    report = qcompile.compile(source, passes, output=tmp_path / "o.onnx", **given, **kept)
    formats = {own.format for own in report.decisions["pack"] if own.action == "quantized"}
    assert formats & {"pairs2", "pairs2.5"}
    assert report.bits_per_weight is not None
    assert report.bits_per_weight <= 2.6
    plain = passes.removeprefix("rotate(judge=false),")
    with pytest.raises(UserError, match=r"budget 2\.6 bits a weight is too small"):
        qcompile.compile(source, plain, output=tmp_path / "p.onnx", **given, **kept)


def test_too_little_memory_is_told_before_weights_are_rounded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sensitivity, "available", lambda: 1000)
    recipe = Recipe(passes=LISTS[0])
    prepared, units = _prepared(source, recipe)
    done: list[str] = []
    monkeypatch.setattr(prices, "rounded_by", lambda *given, **named: done.append("rounded"))
    with pytest.raises(UserError, match="in memory at once"):
        prices.ranking_of(prepared, recipe, Calibration(reader=_feeds()), units, Silent(), None, bound=NO_BOUND)
    assert not done
