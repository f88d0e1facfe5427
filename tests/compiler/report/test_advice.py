"""report/advice.py: what hurts most, and commands that run as they are printed; order; odd calibration data."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.compiler import cli
from qcompile.compiler.recipe import Step
from qcompile.compiler.report.advice import hurting, remedies
from qcompile.compiler.report.coverage import in_order
from qcompile.compiler.report.page import to_html
from qcompile.models.tiny import tiny_conv, tiny_decoder
from qcompile.passes.base import Decision


@pytest.mark.parametrize("passes", ["pack", "smooth,awq,pack", "qdq"])
def test_what_hurts_most_is_ranked_and_the_commands_run(bench: Any, passes: str) -> None:
    """Each of them compiles, and none to a larger error of the worst node but where that is in float."""
    source = bench.save(tiny_decoder())
    report = bench.compile(source, passes, samples=4, context=32, group_size=64, min_coverage=0)
    ranked = hurting(report)
    assert [own.error for own in ranked] == sorted((n.error for n in report.nodes), reverse=True)[: len(ranked)]
    assert sum(own.share for own in ranked) <= 1 + 1e-9
    tried = remedies(report)
    assert tried
    for own in tried:
        name, *words = shlex.split(own.command)
        assert name == "qcompile"
        assert "--samples" in words, "settings that are no default are part of it"
        assert cli.main(words) == 0
    assert own.what.startswith("leave")
    assert f"--exclude {ranked[0].node}" in own.command


def test_pairs_without_a_rotation_have_it_named(bench: Any) -> None:
    source = bench.save(tiny_decoder(hidden=128, ffn=256, layers=1))
    told = {}
    for weights, passes in (("pairs3", "pack"), ("int3", "pack"), ("pairs3", "rotate,pack")):
        report = bench.compile(source, passes, weights=Step(weights), min_cosine=0.0)
        told[weights, passes] = [own for own in remedies(report) if own.what.startswith("turn inputs")]
    (own,) = told.pop(("pairs3", "pack"))
    assert " --passes rotate,pack " in own.command
    assert cli.main(shlex.split(own.command)[1:]) == 0
    assert not any(told.values())


@pytest.mark.parametrize("gone", [{"weights": "gone4"}, {"weights_of": ["*=gone4"]}, {"passes": ["gone", "pack"]}])
def test_nothing_is_advised_where_a_package_is_gone(bench: Any, gone: dict[str, Any]) -> None:
    """A page of an old report is made all the same."""
    report = bench.compile(bench.save(tiny_decoder(layers=1)), "pack")
    assert remedies(report)
    report.recipe.update(gone)
    assert remedies(report) == []
    assert "What hurts most" in to_html(report)


def test_the_command_has_its_data_and_names_are_quoted(bench: Any) -> None:
    source = bench.save(tiny_conv(), tokenizer=False)
    data = bench.folder / "some data.npz"
    np.savez(data, image=np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32))
    report = bench.compile(source, "qdq", calibration=[str(data)])
    for own in remedies(report):
        assert f"--calibration '{data}'" in own.command
    page = to_html(report)
    assert "What hurts most" in page
    assert page.index("What hurts most</h2>") < page.index("Coverage</h2>")


def test_decisions_are_in_the_order_of_the_graph(bench: Any) -> None:
    made = [Decision(name, "quantized", "x") for name in ("d", "b", "new", "a", "c")]
    found = [d.node for d in in_order(made, {name: i for i, name in enumerate("abcd")})]
    assert found == ["a", "b", "new", "c", "d"]
    report = bench.compile(bench.save(tiny_conv(), tokenizer=False), "qdq", calibration=[_arrays(bench, 8)])
    names = [d.node for d in report.quantizing if d.node.startswith("conv")]
    assert names == sorted(names)


def _arrays(bench: Any, rows: int, value: float | None = None) -> str:
    array = np.random.default_rng(0).standard_normal((rows, 3, 32, 32)).astype(np.float32)
    path: Path = bench.folder / f"{rows}-{value}.npz"
    np.savez(path, image=array if value is None else np.full_like(array, value))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "value", "told"),
    [
        (2, None, "the calibration set has 2 rows: ranges of activations are a guess"),
        (8, 0.0, "input image is all zero in the calibration set"),
        (8, 0.5, "input image is 0.5 throughout in the calibration set"),
        (8, None, ""),
    ],
)
def test_odd_calibration_data_is_named(bench: Any, rows: int, value: float | None, told: str) -> None:
    source = bench.save(tiny_conv(), tokenizer=False)
    report = bench.compile(source, "qdq", calibration=[_arrays(bench, rows, value)], min_cosine=0.0)
    assert [warning[: len(told)] for warning in report.warnings] == ([told] if told else [])


def test_equal_batches_are_named(bench: Any) -> None:
    source = bench.save(tiny_conv(), tokenizer=False)
    first = Path(_arrays(bench, 8))
    second = first.with_name("copy.npz")
    second.write_bytes(first.read_bytes())
    report = bench.compile(source, "qdq", calibration=[str(first), str(second)])
    assert report.warnings == ["the calibration set has 2 equal batches: one tells as much"]
