"""What a pass of the walk has made codes of is let go of."""

import gc
import weakref
from typing import Any

import pytest

from qcompile.compiler.console.progress import Silent
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration, gather_data, prepare_model, walk
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.linears import find_linears


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
    source = bench.save(tiny_decoder(), tokenizer=True)
    recipe = Recipe(passes=parse_passes(passes), samples=4, context=32, group_size=32, target=target)
    prepared = prepare_model(source, recipe, Silent())
    weights = {linear.name: weakref.ref(linear.weight) for linear in find_linears(prepared.model.graph)}
    walk(prepared, gather_data(prepared, Calibration([str(bench.text)])))
    gc.collect()
    assert len(weights) > 10
    assert [name for name, weight in weights.items() if weight() is not None] == []
