"""Models of onnxruntime-genai's builder: two values go from layer to layer, caches have a width with a name only."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.genai import _decoder
from graphs.table import Graph

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.data.graph_inputs import cache_sizes
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.facts.value_types import told_by_runtime
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.walk.segments import split
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.prepare import Prepare


def _made(dtype: Any = np.float32, *, layers: int = 2, packed: bool = False, window: int = 0) -> Graph:
    make = Graph()
    make.dtype = dtype
    _decoder(make, layers, packed=packed, window=window)
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


def test_a_cache_that_a_window_slides_over_has_its_room_from_the_first_run_on(tmp_path: Path) -> None:
    """As of Gemma's local layers. ONNX Runtime refuses smaller ones, and drops the oldest tokens of full ones."""
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(_made(window=6).model(), source)
    plan = input_plan(load_model(source))
    assert [pair.window for pair in plan.past] == [6, 6, 0, 0]
    assert not plan.caches.shared
    report = compile_model(source, Recipe(group_size=32, samples=4, context=16), output=out)
    assert report.coverage == 1


def test_a_window_sees_what_a_long_cache_shows_it(tmp_path: Path) -> None:
    """The same tokens, one by one behind a prompt, with the window's attribute and without."""
    found = []
    for sliding in (True, False):
        proto = _made(window=6).model()
        for node in proto.graph.node:
            kept = [own for own in node.attribute if sliding or own.name != "sliding_window_cache"]
            del node.attribute[:]
            node.attribute.extend(kept)
        path = tmp_path / f"{sliding}.onnx"
        onnx.save(_named_widths(proto), path)
        subject = Subject(path)
        found.append(list(generate_ids(subject, [5, 17, 42, 80, 3, 9, 11, 60], 12, Sampling())))
    assert found[0] == found[1]


def _named_widths(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With the widths of the caches as numbers, which here only inference would tell."""
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            dims[3].dim_value = 16
    return proto


def test_widths_that_only_what_is_appended_tells() -> None:
    """As in the builder's float16 models for the CPU: heads that a Concat appends, under a cache of symbolic width."""
    cache, new = (ir.val(name, dtype=ir.DataType.FLOAT, shape=shape) for name, shape in (
        ("past", ("b", "heads", "past", "width")), ("new", ("b", 2, "s", 16)),
    ))  # fmt: skip
    ir.node("Concat", [cache, new], {"axis": -2})
    assert cache_sizes(cache) == {1: 2, 3: 16}


@pytest.mark.parametrize("table", [True, False], ids=["float embedding", "nothing left"])
def test_int4_models_are_told_to_be_so(table: bool, tmp_path: Path) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    onnx.save(_made().model(), tmp_path / "model.onnx")
    embedding = None if table else 8
    recipe = Recipe(passes=parse_passes("pack"), group_size=32, target="matmulnbits", embedding=embedding)
    compile_model(tmp_path / "model.onnx", recipe, output=first)
    if table:
        report = compile_model(first, Recipe(passes=parse_passes("pack"), min_coverage=0.0), output=again)
        assert "weights are quantized already" in report.told
    else:
        with pytest.raises(UserError, match=r"quantizes nothing of this model: its \d+ weights are quantized already"):
            compile_model(first, Recipe(passes=parse_passes("pack")), output=again)
