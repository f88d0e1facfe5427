"""What a pass of the walk has made codes of is let go of."""

import gc
import weakref
from typing import Any

import onnx_ir as ir
import pytest

from qcompile.compiler.console.progress import Silent
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration, Walked, finish, gather_data, prepare_model, walk
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.linears import find_linears

References = dict[str, "weakref.ReferenceType[ir.Value]"]


def _walked(bench: Any, passes: str, target: str) -> tuple[Walked, References]:
    """A model behind the walk, and its float weights, not held."""
    source = bench.save(tiny_decoder(), tokenizer=True)
    recipe = Recipe(passes=parse_passes(passes), samples=4, context=32, group_size=32, target=target, min_coverage=0)
    prepared = prepare_model(source, recipe, Silent())
    weights = {linear.name: weakref.ref(linear.weight) for linear in find_linears(prepared.model.graph)}
    assert len(weights) > 10
    return walk(prepared, gather_data(prepared, Calibration([str(bench.text)]))), weights


def _left(weights: References) -> list[str]:
    gc.collect()
    return [name for name, weight in weights.items() if weight() is not None]


@pytest.mark.parametrize(
    ("passes", "target"),
    [
        ("pack", "qcompile"),
        ("smooth,awq,gptq,pack", "qcompile"),
        ("smooth,awq,pack", "matmulnbits"),
    ],
)
def test_no_float_weight_outlives_its_segment(bench: Any, passes: str, target: str) -> None:
    """Nor do its codes from before they were packed, which go with it. Scaled weights are in memory, not in a file."""
    walked, weights = _walked(bench, passes, target)
    assert _left(weights) == []
    assert walked.outputs


@pytest.mark.parametrize("passes", ["smooth,qdq", "dynamic", "smooth,qdq,bias_correction", "outlier,qdq", "gptq,qdq"])
def test_no_float_weight_outlives_the_checks(bench: Any, passes: str) -> None:
    """What is made behind the walk is compared with its float form; then that goes before the file is written."""
    walked, weights = _walked(bench, passes, "qdq")
    finish(walked, Silent())
    assert _left(weights) == []
    assert walked.outputs
