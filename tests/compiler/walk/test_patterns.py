"""--include, --exclude and --weights-of: what they match, and what is said of one that matches nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs.table import Graph
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.files.load import load_model
from qcompile.compiler.walk.patterns import check_patterns
from qcompile.models.tiny import tiny_conv, tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.origins import fits, matches, names_of
from qcompile.passes.prepare import Prepare

CODES = {"INT8", "UINT8", "INT4", "UINT4"}


def _torch_like(path: Path) -> Graph:
    """Three products, named as exporters name them: slashes, brackets, a weight by its node, a Gemm turned round."""
    make = Graph()
    x = make.input("b", 32)
    first = make.linear(x, 32)
    second = make.linear(make.one("Relu", first), 32)
    weight = make.floats(32, 32)
    make.output(make.one("Gemm", make.one("Relu", second), weight, transB=1))
    names = iter(["/model/layers.0/q_proj/MatMul", "/relu", "/model/layers.1/up[0]/MatMul", "/relu_1", "/head/Gemm"])
    for node in make.nodes:
        node.name = next(names)
    renamed = {make.nodes[0].input[1]: "onnx::MatMul_12", make.nodes[2].input[1]: "layers[1].w", weight: "fc.weight"}
    for node in make.nodes:
        for i, value in enumerate(node.input):
            node.input[i] = renamed.get(value, value)
    for constant in make.constants:
        constant.name = renamed.get(constant.name, constant.name)
    onnx.save(make.model(), path)
    return make


@pytest.mark.parametrize("passes", ["pack", "qdq", "dynamic"])
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude": ("/model/layers.0/*",)}, 1),
        ({"exclude": ("/model/layers.1/up[0]/MatMul",)}, 1),
        ({"exclude": ("*up[0]*",)}, 1),
        ({"exclude": ("layers[1].w",)}, 1),
        ({"exclude": ("onnx::MatMul_12",)}, 1),
        ({"exclude": ("fc.weight",)}, 1),
        ({"exclude": ("/head/Gemm",)}, 1),
        ({"exclude": ("Gemm",)}, 1),
        ({"exclude": ("MatMul",)}, 3),
        ({"exclude": ("*",)}, 3),
        ({"include": ("*q_proj*",)}, 2),
        ({"include": ("*layers*",), "exclude": ("*q_proj*",)}, 2),
        ({"include": ("Gemm", "onnx::*")}, 1),
        ({"weights_of": ("*q_proj*=keep",)}, 1),
        ({"weights_of": ("onnx::*=keep", "Gemm = keep")}, 2),
    ],
    ids=str,
)
def test_what_is_left_in_float(tmp_path: Path, passes: str, options: dict[str, Any], left: int) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "o.onnx"
    graph = _torch_like(source)
    np.savez(tmp_path / "c.npz", **graph.feeds(0))
    recipe = Recipe(passes=parse_passes(passes), group_size=32, **options)
    report = compile_model(source, recipe, output=output, calibration=Calibration([str(tmp_path / "c.npz")]))
    large = [v.const_value for v in load_model(output).graph.initializers.values() if v.const_value.size == 1024]
    assert len([tensor for tensor in large if tensor.dtype.name in CODES]) == 3 - left
    if left == 3:  # nothing else is rounded either
        assert max(found.relative for found in report.outputs) == 0


@pytest.mark.parametrize("option", ["include", "exclude", "weights-of"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [("nothing_like_this", ""), ("*/LAYERS.0/*", "'/model/layers.0/q_proj/MatMul'"), ("fc.weights", "'fc.weight'")],
)
def test_a_pattern_without_a_match_is_refused(tmp_path: Path, option: str, pattern: str, near: str) -> None:
    _torch_like(tmp_path / "m.onnx")
    given = {"weights_of": (f"{pattern}=int8",)} if option == "weights-of" else {option: (pattern,)}
    recipe = Recipe(passes=parse_passes("pack"), **given)  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx")
    told = str(error.value)
    assert told.startswith(f"--{option} '{pattern}' matches no ")
    assert "the nearest names are '" in told
    assert near in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_include_needs_something_to_quantize(tmp_path: Path) -> None:
    _torch_like(tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    Prepare().call(Region.whole(model))
    check_patterns(("*",), ("/relu",), (), model)
    with pytest.raises(UserError, match="--include '/relu' matches no weight"):
        check_patterns(("/relu",), (), (), model)


@given(st.text("ab[]0-!*?.", max_size=8), st.text("ab[]0-!.", max_size=8))
def test_a_name_matches_itself_and_itself_between_stars(name: str, other: str) -> None:
    assert fits(name, name)
    assert fits("*", name)
    if not set(name) & set("*?"):
        assert fits(f"*{name}*", f"x{name}y")
        assert fits(f"{name}*", name + other)


@pytest.mark.parametrize("make", [tiny_decoder, tiny_conv], ids=lambda make: make.__name__)
def test_every_node_of_the_source_is_found_by_its_name_and_its_weights(make: Any) -> None:
    """Whatever `prepare` made of a product, the patterns of its source still mean it."""
    source, model = make(), make()
    Prepare().call(Region.whole(model))
    read = [(n.name, v.name) for n in source.graph for v in n.inputs if v is not None and v.const_value is not None]
    products = [node for node in source.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert products
    for product in products:
        for name in (product.name, *(weight for node, weight in read if node == product.name)):
            assert any(matches(name, node) for node in model.graph), (name, [names_of(node) for node in model.graph])
