"""Names of weights as a budget writes them into a recipe: in quotes, and meant as they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.plan import grid, make_policy
from qcompile.compiler.recipe import Recipe, dump_recipe, parse_passes, parse_step
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.steps import parse_named
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.sweep.budget.units import find_units
from qcompile.models.tiny.build import Builder
from qcompile.passes import lists
from qcompile.passes.errors import UserError
from qcompile.passes.exact import quoted
from qcompile.passes.linears import find_linears

NASTY = (
    "layers[0].weight",
    "*",
    "w*",
    "[!a]?",
    "MatMul",
    "Gather",
    "a node",
    "x = y",
    "=",
    '"quoted"',
    "it's",
    "back\\slash",
    "größe",
    "two\nlines",
    "tab\t",
    "a",
    "a.b",
    "int4(group=64)",
    "keep",
    " ",
    "null",
    "yes",
    "# no comment",
    "p,q",
)


def _named_oddly(names: Sequence[str]) -> ir.Model:
    """A chain of products whose weights have these names, and whose nodes have those of other weights."""
    random, b = np.random.default_rng(len(names)), Builder(opset=21)
    x = b.input("x", ir.DataType.FLOAT, ["n", 64])
    for place, name in enumerate(names):
        weight = b.weight(name, random.normal(0, 0.12, (64, 64)))
        x = b.MatMul(x, weight, name=names[place - 1])
        x = b.Tanh(x, name=f"act {place}")
    return b.model({"y": x}, check=False)


@given(st.lists(st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
                min_size=2, max_size=6, unique=True))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_quoted_name_is_that_of_one_weight(names: list[str]) -> None:
    """Whatever it is made of, and whatever nodes are called: each weight has its own format, through a file, too."""
    found = find_linears(_named_oddly(names).graph)
    wanted = [lists.CANDIDATES[place % len(lists.CANDIDATES)] for place in range(len(found))]
    given = tuple(f"{quoted(str(own.weight.name))}={told}" for own, told in zip(found, wanted, strict=True))
    recipe = Recipe(parse_passes("pack"), weights_of=given)
    assert Recipe.from_dict(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert parse_named(f" {given[0]} ", "keep", "") == recipe.named[0]
    policy = make_policy(recipe)
    assert [str(policy.for_linear(own, None)) for own in found] == [
        str(grid(parse_step(f), "qcompile")) for f in wanted
    ]


def test_every_weight_of_a_budget_is_covered_whatever_it_is_called(tmp_path: Path) -> None:
    """The compile has the sizes that were chosen: no weight had a format that was not meant for it."""
    ir.save(_named_oddly(NASTY), tmp_path / "m.onnx")
    feeds = [{"x": np.random.default_rng(i).normal(size=(16, 64)).astype(np.float32)} for i in range(4)]
    report = qcompile.compile(tmp_path / "m.onnx", "pack", output=tmp_path / "o.onnx", calibration=feeds, budget="5bpw")
    done = [own for own in report.decisions["pack"] if own.action == "quantized"]
    assert {own.detail["weight"] for own in done} == set(NASTY)
    assert len(report.recipe["weights_of"]) == len(NASTY)
    assert _told_bits(report) == pytest.approx(report.bits_per_weight, abs=0.006)


def _told_bits(report: Report) -> float:
    return float(report.target[0].partition(": ")[2].partition(" ")[0])


@pytest.mark.parametrize("text", ['"a" b=int4', '"a"', '"a"int4=int4', '"a"=', '"a" ='])
def test_what_stands_behind_a_quoted_name_is_its_format(text: str) -> None:
    with pytest.raises(UserError, match="weights_of: cannot read"):
        parse_named(text, "keep", "weights_of")


def test_an_open_quote_is_a_letter_of_a_pattern() -> None:
    assert parse_named('"a*=int8', "keep", "") == ('"a*', parse_step("int8"))


def test_a_weight_that_is_read_both_ways_round_is_one_unit(tmp_path: Path) -> None:
    """`prepare` makes two of it; what else a node read, such as a bias that all have, joins nothing."""
    random, b = np.random.default_rng(0), Builder(opset=21)
    x = b.input("x", ir.DataType.FLOAT, ["n", 64])
    both, other = (b.weight(name, random.normal(0, 0.1, (64, 64))) for name in ("a", "b"))
    bias = b.weight("bias", np.zeros(64, np.float32))
    x = b.Tanh(b.MatMul(x, both, name="first"))
    x = b.Tanh(b.Gemm(x, both, bias, transB=1, name="second"))
    x = b.Tanh(b.Gemm(x, other, bias, transB=1, name="third"))
    ir.save(b.model({"y": x}), tmp_path / "m.onnx")
    prepared = prepare_model(tmp_path / "m.onnx", Recipe(parse_passes("pack")), Silent())
    units = find_units(prepared.model, prepared.policy)
    assert [own.names for own in units] == [("first", "second"), ("third",)]
    feeds = [{"x": random.normal(size=(16, 64)).astype(np.float32)} for _ in range(4)]
    report = qcompile.compile(tmp_path / "m.onnx", "pack", output=tmp_path / "o.onnx", calibration=feeds, budget="5bpw")
    formats = {own.node: own.format for own in report.decisions["pack"]}
    assert formats["first"] == formats["second"]
    assert _told_bits(report) == pytest.approx(report.bits_per_weight, abs=0.006)
