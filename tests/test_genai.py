"""Models of onnxruntime-genai's builder: two values go from layer to layer, caches have a width with a name only."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.genai import _decoder
from graphs.table import Graph

from qcompile.compiler import Recipe, compile_model
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.facts.value_types import told_by_runtime
from qcompile.compiler.walk.segments import split
from qcompile.passes.base import Region
from qcompile.passes.linears import find_linears
from qcompile.passes.prepare import Prepare


def _made(dtype: Any = np.float32, *, layers: int = 2, packed: bool = False) -> Graph:
    make = Graph()
    make.dtype = dtype
    _decoder(make, layers, packed=packed)
    return make


def _prepared(make: Graph) -> ir.Model:
    model = ir.from_proto(make.model())
    Prepare().call(Region.whole(model, told_by_runtime))
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_is_two_segments(packed: bool) -> None:
    model = _prepared(_made(layers=3, packed=packed))
    targets = {linear.node for linear in find_linears(model.graph)}
    segments = split(model, targets.__contains__)
    assert [len(segment.carry) for segment in segments] == [2, 2, 2, 2, 2, 1, 0]
    attention = 2 if packed else 4
    assert [len(targets & set(own.nodes)) for own in segments] == [attention, 3, attention, 3, attention, 3, 1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_types_and_widths_that_the_file_does_not_say(dtype: Any, packed: bool) -> None:
    model = _prepared(_made(dtype, packed=packed))
    expected = ir.DataType.from_numpy(np.dtype(dtype))
    assert {linear.activation.dtype for linear in find_linears(model.graph)} == {expected}
    assert all(pair.empty(3).shape == (3, 2, 0, 16) for pair in input_plan(model).past)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tokens_are_enough_to_calibrate(dtype: Any, tmp_path: Path) -> None:
    onnx.save(_made(dtype).model(), tmp_path / "model.onnx")
    recipe = Recipe(group_size=32, samples=4, context=16)
    report = compile_model(tmp_path / "model.onnx", recipe, output=tmp_path / "out.onnx")
    assert report.coverage == 1
