"""compiler/segments.py: cuts where one value carries everything forward."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.segments import Segment, split
from qcompile.models.tiny import tiny_branch, tiny_decoder, tiny_encoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.linears import find_linears


def _targets(model: ir.Model) -> set[ir.Node]:
    return {linear.node for linear in find_linears(model.graph)}


def _split(model: ir.Model) -> list[Segment]:
    return split(model, _targets(model).__contains__)


@pytest.mark.parametrize("options", [{}, {"kv_cache": True}, {"tied": False}, {"norm": "layer"}], ids=str)
def test_a_decoder_is_cut_at_its_residual_stream(options: dict[str, object]) -> None:
    segments = _split(tiny_decoder(layers=2, **options))  # type: ignore[arg-type]
    stream = [
        "model.layers.0.post_attention_layernorm.residual.out",
        "model.layers.1.input_layernorm.residual.out",
        "model.layers.1.post_attention_layernorm.residual.out",
        "model.norm.residual.out",
    ]
    assert [[value.name for value in s.carry] for s in segments] == [*([name] for name in stream), []]
    assert [[value.name for value in s.carried] for s in segments] == [[], *([name] for name in stream)]


@pytest.mark.parametrize(
    "model", [tiny_decoder(), tiny_decoder(norm="skip"), tiny_encoder()], ids=["rms", "skip", "bert"]
)
def test_segments_cover_every_target_once_and_only_the_carry_crosses(model: ir.Model) -> None:
    segments, targets = _split(model), _targets(model)
    nodes = [node for segment in segments for node in segment.nodes]
    assert len(nodes) == len(set(nodes))
    assert targets <= set(nodes)
    assert all(targets & set(segment.nodes) for segment in segments)
    order = {node: i for i, node in enumerate(model.graph)}
    assert [order[node] for node in nodes] == sorted(order[node] for node in nodes)
    home = {node: i for i, segment in enumerate(segments) for node in segment.nodes}
    for node, number in home.items():
        for value in node.outputs:
            later = {home[use.node] for use in value.uses() if use.node in home} - {number}
            assert later <= {number + 1}
            assert not later or value in segments[number].carry


def test_masks_and_rotary_tables_belong_to_no_segment() -> None:
    model = tiny_decoder()
    inside = {node.op_type for segment in _split(model) for node in segment.nodes}
    light = {"Cos", "Sin", "Range", "LessOrEqual"}
    assert light <= {node.op_type for node in model.graph}
    assert not light & inside


def test_where_two_values_are_always_alive_nothing_is_cut() -> None:
    b = Builder(opset=21)
    ids = b.input("ids", ir.DataType.INT64, ["n"])
    x = b.Gather(b.weight("table", np.ones((64, 64), "f4")), ids, name="table", axis=0)
    y = b.MatMul(b.MatMul(x, b.weight("a", np.ones((64, 64), "f4")), name="a"), b.weight("b", np.eye(64)), name="b")
    model = b.model({"z": b.Add(x, y)})
    (segment,) = _split(model)
    assert (segment.carried, segment.carry) == ((), ())
    assert segment.nodes == list(model.graph)


def test_without_targets_the_whole_graph_is_one_segment() -> None:
    model = tiny_branch()
    (segment,) = split(model, lambda node: False)
    assert segment.nodes == list(model.graph)
