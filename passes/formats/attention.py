"""GroupQueryAttention of domain `qcompile`: com.microsoft's, which the kernel library computes faster on the CPU.

Inputs, outputs and attributes are com.microsoft's; its node is the body. GroupQueryAttentionF16 has float16 caches
beside float32 queries; its body casts them, whole, in every run.
"""

import onnx
import onnx_ir as ir
from onnx import helper

from qcompile.passes.caches import ATTENTION, HALF_ATTENTION, MICROSOFT_ATTENTION
from qcompile.passes.formats.base import DOMAIN, VERSION
from qcompile.passes.graph import MICROSOFT

_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
)  # fmt: skip
_OUTPUTS = ("output", "present_key", "present_value")
_REQUIRED = {"num_heads": 1, "kv_num_heads": 1}
_OPTIONAL = {
    "scale": 0.0,
    "softcap": 0.0,
    "local_window_size": -1,
    "do_rotary": 0,
    "rotary_interleaved": 0,
    "k_quant_type": "NONE",
    "v_quant_type": "NONE",
    "kv_cache_bit_width": 0,
}
_WIDEST = 1024  # head that the kernel takes: kMaxWidth of runtime/kernels/attention.h
# (queries, caches) that the kernel has.
_TYPES = {
    (ir.DataType.FLOAT, ir.DataType.FLOAT),
    (ir.DataType.FLOAT16, ir.DataType.FLOAT16),
    (ir.DataType.FLOAT, ir.DataType.INT8),
    (ir.DataType.FLOAT16, ir.DataType.INT8),
}


def attention_body(name: str = ATTENTION[1]) -> onnx.FunctionProto:
    """com.microsoft's node alone, or between Casts of the caches; attributes and optional inputs go on as they are."""
    node = helper.make_node(MICROSOFT_ATTENTION[1], _INPUTS, _OUTPUTS, domain=MICROSOFT)
    kinds = {name: helper.make_attribute(name, value) for name, value in (_REQUIRED | _OPTIONAL).items()}
    node.attribute.extend(
        onnx.AttributeProto(name=name, ref_attr_name=name, type=own.type) for name, own in kinds.items()
    )
    nodes = [node] if name == ATTENTION[1] else _between_casts(node)
    return helper.make_function(
        DOMAIN, name, _INPUTS, _OUTPUTS, nodes,
        [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        list(_REQUIRED), [kinds[name] for name in _OPTIONAL],
    )  # fmt: skip


def _between_casts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node over float16 caches."""
    before, behind = [], []
    for slot in (3, 4):
        own, node.input[slot] = node.input[slot], f"{node.input[slot]}_float"
        before.append(helper.make_node("Cast", [own], [node.input[slot]], to=onnx.TensorProto.FLOAT))
    for slot in (1, 2):
        own, node.output[slot] = node.output[slot], f"{node.output[slot]}_float"
        behind.append(helper.make_node("Cast", [node.output[slot]], [own], to=onnx.TensorProto.FLOAT16))
    return [*before, node, *behind]


def to_half(node: ir.Node) -> None:
    """Have a GroupQueryAttention of com.microsoft over float32 caches keep them in float16."""
    node.domain, node.op_type = HALF_ATTENTION
    _drop_others(node)
    for cache in (*node.inputs[3:5], *node.outputs[1:3]):
        assert cache is not None
        cache.type = ir.TensorType(ir.DataType.FLOAT16)


def _drop_others(node: ir.Node) -> None:
    """Drop the attributes that the body has not: `has_kernel` lets none of them say anything."""
    for name in [name for name in node.attributes if name not in _REQUIRED | _OPTIONAL]:
        del node.attributes[name]


def has_kernel(node: ir.Node) -> bool:
    """Whether a GroupQueryAttention of com.microsoft is one that the kernel library computes."""
    if (node.domain, node.op_type) != MICROSOFT_ATTENTION or len(node.outputs) != len(_OUTPUTS):
        return False
    given = dict(zip(_INPUTS, node.inputs, strict=False))
    if len(node.inputs) > len(_INPUTS) or given.get("head_sink") is not None:
        return False
    if any(given.get(name) is None for name in _INPUTS[3:7]):
        return False
    # What other attributes say in their other settings (sliding caches, smooth softmax) it does not do.
    if any(attribute.value for name, attribute in node.attributes.items() if name not in _REQUIRED | _OPTIONAL):
        return False
    widths = [
        own.shape[3] for own in node.inputs[3:5] if own is not None and own.shape is not None and len(own.shape) == 4
    ]
    if any(isinstance(width, int) and width > _WIDEST for width in widths):
        return False
    query, key, value = (own.dtype if own is not None else None for own in (node.inputs[0], *node.inputs[3:5]))
    # com.microsoft's leaves scales beside other caches unread.
    if any((given.get(name) is not None) != (key == ir.DataType.INT8) for name in ("k_scale", "v_scale")):
        return False
    return key == value and any(own == (query or own[0], key) for own in _TYPES)


def to_native(model: ir.Model) -> bool:
    """Have every GroupQueryAttention that the library has a kernel for be its own operator; whether there is one."""
    nodes = [node for node in model.graph.all_nodes() if has_kernel(node)]
    for node in nodes:
        node.domain = DOMAIN
        _drop_others(node)
    if nodes:
        model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    return bool(nodes)


def to_microsoft_attention(model: ir.Model) -> None:
    """The way back: passes know com.microsoft's alone."""
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) == ATTENTION:
            node.domain = MICROSOFT
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
    model.functions.pop((*ATTENTION, ""), None)
