"""GroupQueryAttention becomes the kernel library's own operator in files for it, and com.microsoft's for passes."""

import onnx_ir as ir
import pytest
from fusing import fuse_attention

from qcompile.models.tiny import tiny_decoder
from qcompile.passes.caches import ATTENTION, MICROSOFT_ATTENTION
from qcompile.passes.formats.attention import to_microsoft_attention, to_native
from qcompile.passes.formats.lower import lower


@pytest.fixture
def fused() -> ir.Model:
    return fuse_attention(tiny_decoder(kv_cache=True))[0]


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == ATTENTION[1]]


def test_there_and_back(fused: ir.Model) -> None:
    before = [(dict(node.attributes), list(node.inputs)) for node in _attentions(fused)]
    assert len(before) == 2
    lower(fused, "qcompile")
    assert {(node.domain, node.op_type) for node in _attentions(fused)} == {ATTENTION}
    assert (*ATTENTION, "") in fused.functions
    to_microsoft_attention(fused)
    assert {(node.domain, node.op_type) for node in _attentions(fused)} == {MICROSOFT_ATTENTION}
    assert [(dict(node.attributes), list(node.inputs)) for node in _attentions(fused)] == before
    assert not fused.functions


def test_files_for_others_keep_com_microsoft_s(fused: ir.Model) -> None:
    lower(fused, "matmulnbits")
    assert {node.domain for node in _attentions(fused)} == {"com.microsoft"}


@pytest.mark.parametrize(
    "what", ["sink", "smooth_softmax", "sliding_window_cache", "4 bits", "scores", "wide", "scales"]
)
def test_what_the_kernel_does_not_do_stays(fused: ir.Model, what: str) -> None:
    first, second = _attentions(fused)
    if what == "sink":
        first.resize_inputs(12)
        first.replace_input_with(11, first.inputs[0])
    elif what == "4 bits":
        for value in first.inputs[3:5]:
            value.type = ir.TensorType(ir.DataType.UINT8)
    elif what == "wide":
        for node, width in ((first, 1032), (second, 1024)):
            for value in node.inputs[3:5]:
                value.shape = ir.Shape([1, 2, "past", width])
    elif what == "scales":
        first.resize_inputs(14)
        first.replace_input_with(12, first.inputs[0])
    elif what == "scores":
        first.resize_outputs(4)
    else:
        first.attributes[what] = ir.AttrInt64(what, 1)
        second.attributes[what] = ir.AttrInt64(what, 0)
    assert to_native(fused)
    assert (first.domain, second.domain) == ("com.microsoft", "qcompile")
