"""Pass kv16: caches in half precision beside single, and which stay as they are."""

import onnx_ir as ir
import pytest
from fusing import fuse_attention, nodes_of

from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Decision, Region
from qcompile.passes.contrib.codes import HalfPrecision, codes_of
from qcompile.passes.contrib.half import HalfCaches
from qcompile.passes.graph import Names, insert_before


def _halved(model: ir.Model) -> list[Decision]:
    own = HalfCaches()
    own.call(Region.whole(model))
    return own.decisions


@pytest.fixture
def fused() -> ir.Model:
    return fuse_attention(tiny_decoder(kv_cache=True))[0]


def test_caches_are_float16_and_queries_float32(fused: ir.Model) -> None:
    assert [own.action for own in _halved(fused)] == ["coded"] * 2
    for node in nodes_of(fused, "GroupQueryAttentionF16"):
        assert node.inputs[0] is not None
        assert node.inputs[0].dtype != ir.DataType.FLOAT16
        for cache in (*node.inputs[3:5], *node.outputs[1:3]):
            assert cache is not None
            assert cache.dtype == ir.DataType.FLOAT16
        assert all(isinstance(codes_of(cache), HalfPrecision) for cache in node.inputs[3:5] if cache is not None)


def test_float16_models_have_them_already() -> None:
    model = fuse_attention(tiny_decoder(kv_cache=True, dtype="fp16"))[0]
    assert {(own.action, own.reason) for own in _halved(model)} == {("kept", "its caches are no float32 numbers")}


def test_written_attention_keeps_its_caches() -> None:
    decided = _halved(tiny_decoder(kv_cache=True))
    assert [(own.action, own.reason) for own in decided] == [("kept", "no GroupQueryAttention lengthens it")] * 4


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("reader", "a Abs reads its caches, too"),
        ("kernel", "the library has no kernel for what it does"),
    ],
)
def test_what_stays_has_its_reason(fused: ir.Model, what: str, reason: str) -> None:
    first = nodes_of(fused, "GroupQueryAttention")[0]
    if what == "reader":
        other = nodes_of(fused, "GroupQueryAttention")[1]
        made = insert_before(other, "Abs", [first.outputs[1]], {}, name="abs", output=Names(fused).fresh("abs"))
        fused.graph.outputs.append(made)
    else:
        first.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    assert [(own.action, own.reason) for own in _halved(fused)] == [("kept", reason), ("coded", "float16 caches")]
