"""compiler/walk/segments.py: cuts where one value carries everything forward."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.walk.segments import Segment, split, targets
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


def test_small_segments_are_joined_and_the_time_is_linear() -> None:
    b = Builder(opset=21)
    x = b.input("x", ir.DataType.FLOAT, ["n", 8])
    for number in range(3000):
        x = b.Relu(b.MatMul(x, b.weight(f"w{number}", np.eye(8, dtype=np.float32))))
    model = b.model({"y": x})
    segments = _split(model)
    assert 200 <= len(segments) <= 256
    assert sum(len(segment.nodes) for segment in segments) == 6000


@pytest.mark.parametrize(("count", "least", "most"), [(100, 1, 1), (300, 100, 256), (9000, 281, 290)])
def test_many_convolutions_are_cut_too(count: int, least: int, most: int) -> None:
    """No segment has more products than 32: sessions and observers of more take longer than their share."""
    b = Builder(opset=21)
    x, w = b.input("x", ir.DataType.FLOAT, ["n", 2, 1, 1]), np.ones((2, 2, 1, 1), np.float32)
    for number in range(count):
        x = b.Relu(b.Conv(x, b.weight(f"w{number}", w)))
    model = b.model({"y": x})
    segments = split(model, targets(model).__contains__)
    assert least <= len(segments) <= most
    assert sum(len(segment.nodes) for segment in segments) == 2 * count


def test_a_giant_segment_is_cut_where_the_fewest_values_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two towers side by side: there is no place where one value goes on."""
    monkeypatch.setattr("qcompile.compiler.walk.segments._GIANT", 1 << 18)
    b = Builder(opset=21)
    sides = [b.input(name, ir.DataType.FLOAT, ["n", 64]) for name in "ab"]
    for number in range(40):
        sides = [
            b.Relu(b.MatMul(s, b.weight(f"w{number}{i}", np.eye(64, dtype=np.float32)))) for i, s in enumerate(sides)
        ]
    model = b.model({"y": b.Add(*sides)})
    segments = _split(model)
    assert len(segments) > 4
    assert all(len(segment.carry) == 2 for segment in segments[1:-1])
    assert max(len(_targets(model) & set(segment.nodes)) for segment in segments) <= 16


def test_linears_that_share_a_weight_lie_in_one_segment() -> None:
    b = Builder(opset=21)
    x, shared = b.input("x", ir.DataType.FLOAT, ["n", 64]), b.weight("w", np.eye(64, dtype=np.float32))
    for number in range(6):
        x = b.Relu(b.MatMul(x, shared if number % 2 else b.weight(f"w{number}", np.eye(64, dtype=np.float32))))
    model = b.model({"y": x})
    home = [{linear.weight.name for linear in find_linears(segment.nodes)} for segment in _split(model)]
    assert sum("w" in names for names in home) == 1


@pytest.mark.parametrize("rows", [1, 8])
def test_small_constants_begin_no_stream(rows: int) -> None:
    """What a small matrix alone makes, a mask or a table of positions, is computed where it is read, however late."""
    b = Builder(opset=21)
    x, eye = b.input("x", ir.DataType.FLOAT, ["n", 64]), np.eye(64, dtype=np.float32)
    light = b.Cos(b.Mul(b.input("at", ir.DataType.FLOAT, ["n", 1]), b.weight("small", np.ones((rows, 64), "f4"))))
    for number in range(4):
        x = b.Relu(b.MatMul(x, b.weight(f"w{number}", eye)))
    segments = _split(b.model({"y": b.Add(x, light)}))
    assert len(segments) == 4
    assert all(len(segment.carry) == 1 for segment in segments[:-1])
    assert not {"Cos", "Mul"} & {node.op_type for segment in segments for node in segment.nodes}


def test_what_a_large_constant_makes_is_part_of_the_stream() -> None:
    b = Builder(opset=21)
    x, eye = b.input("x", ir.DataType.FLOAT, ["n", 64]), np.eye(64, dtype=np.float32)
    heavy = b.Gather(b.weight("table", np.ones((64, 64), "f4")), b.input("at", ir.DataType.INT64, ["n"]), axis=0)
    x = b.MatMul(b.MatMul(x, b.weight("a", eye)), b.weight("b", eye))
    (segment,) = _split(b.model({"y": b.Add(x, heavy)}))
    assert "Gather" in {node.op_type for node in segment.nodes}


@pytest.mark.parametrize("head_reads_the_table", [True, False])
def test_what_is_made_of_constants_alone_is_a_weight(head_reads_the_table: bool) -> None:
    """A tied table: its first reader and its last one lie in the first segment and the last, with cuts between."""
    b = Builder(opset=21)
    eye, tied = np.eye(64, dtype=np.float32), b.weight("table", np.ones((64, 64), "f4"))
    turned = b.Transpose(tied, perm=[1, 0])
    first, last = (turned, tied) if head_reads_the_table else (tied, turned)
    x = b.Gather(first, b.input("at", ir.DataType.INT64, ["n"]), axis=0)
    for number in range(3):
        x = b.Relu(b.MatMul(x, b.weight(f"w{number}", eye)))
    segments = _split(b.model({"y": b.MatMul(x, last)}))
    assert [len(segment.carry) for segment in segments] == [1, 1, 1, 0]
    assert "Transpose" not in {node.op_type for segment in segments for node in segment.nodes}
