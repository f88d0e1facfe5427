"""Attention and EmbedLayerNormalization of ONNX Runtime's optimizer, with their weights outside."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Names
from qcompile.passes.prepare.sizes import named_sizes
from qcompile.passes.prepare.writer import Writer

# What both operators call the same.
_SHARED = ("num_heads", "unidirectional", "mask_filter_value", "scale")
_LENGTHS = {"ReduceSum", "EmbedLayerNormalization", "ArgMax"}


def take_attention_apart(node: ir.Node, names: Names, home: ir.Graph, fixed: set[ir.Value]) -> str:
    """x (B, S, D) times packed weights (D, q + k + v) plus bias, split, into MultiHeadAttention; why not, or "".

    MultiHeadAttention takes the masks of Attention as they are, but for (2 B,) with ends and starts, and (B, 1, M, M).
    past and present (2, B, N, P, H) become one value each for keys and values.
    """
    x, weight, bias, mask, past, added, *more = [*node.inputs, *[None] * 7][:7]
    heads = node.attributes.get_int("num_heads")
    problem = _problem(node, weight, mask, fixed) or ("it has a past of a fixed length" if any(more) else "")
    sizes = node.attributes.get_ints("qkv_hidden_sizes")
    if sizes is None and weight is not None and weight.shape is not None and isinstance(weight.shape[-1], int):
        sizes = [weight.shape[-1] // 3] * 3
    if problem or not heads or not sizes:
        return problem or "its number of heads or the widths of q, k and v are not told"
    write = Writer(node, names, home)
    packed = write.op("MatMul", [x, weight])
    packed = packed if bias is None else write.op("Add", [packed, bias], "bias")
    queries, keys, values = write.parts(packed, list(sizes), -1, "split")
    before: list[ir.Value | None] = [None, None]
    if past is not None:
        halves = write.parts(past, [1, 1], 0, "past")
        before = [write.squeeze(half, [0], f"past_{i}") for i, half in enumerate(halves)]
    attributes = {name: node.attributes[name].value for name in _SHARED if name in node.attributes}
    has_present = len(node.outputs) > 1 and bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    operands = [queries, keys, values, None, mask, added, *before]
    while operands[-1] is None:
        operands.pop()
    result, *caches = write.ops(
        "MultiHeadAttention", operands, "heads", attributes, domain=node.domain, outputs=3 if has_present else 1
    )
    present = None
    if caches:
        both = [write.unsqueeze(cache, [0], f"present_{i}") for i, cache in enumerate(caches)]
        present = write.op("Concat", both, "present", {"axis": 0})
    write.end(result, present)
    return ""


def _problem(node: ir.Node, weight: ir.Value | None, mask: ir.Value | None, fixed: set[ir.Value]) -> str:
    if weight is None or weight not in fixed:
        return "its weights are computed"
    for name in ("do_rotary", "past_present_share_buffer"):
        if node.attributes.get_int(name, 0):
            return f"MultiHeadAttention has no {name}"
    if mask is None:
        return ""
    producer = mask.producer()
    if mask.shape is None and producer is not None and producer.op_type == "EmbedLayerNormalization":
        return ""
    if mask.shape is None:
        return "the form of its mask is unknown"
    if len(mask.shape) == 1 and not _is_length(mask, node.inputs[0]):
        return "its mask may hold starts and ends"
    return "its mask has 4 axes" if len(mask.shape) > 3 else ""


def _is_length(mask: ir.Value, x: ir.Value | None) -> bool:
    """Whether a mask of one axis is (B,) or (3 B + 2,), and not (2 B,)."""
    size, batch = named_sizes(mask)[0], named_sizes(x)[0] if x is not None and x.shape else None
    if isinstance(size, int) and isinstance(batch, int):
        return size != 2 * batch
    producer = mask.producer()
    while producer is not None and producer.op_type in ("Cast", "Identity") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return (size is not None and size == batch) or (producer is not None and producer.op_type in _LENGTHS)


def take_embeddings_apart(node: ir.Node, names: Names, home: ir.Graph, fixed: set[ir.Value]) -> str:
    """The sum of rows of two or three tables, normalized; why not, or "".

    The second output, where it is read: the number of ones of each row of the mask, 0 without a mask.
    """
    ids, segments, words, positions, kinds, gamma, beta, mask, places = [*node.inputs, *[None] * 9][:9]
    if node.attributes.get_int("mask_index_type", 0):
        return "its mask_index_type is not 0"
    write = Writer(node, names, home)
    if places is None:
        places = _counted(write, ids)
    total = write.op("Gather", [words, ids], "words")
    total = write.op("Add", [total, write.op("Gather", [positions, places], "positions")], "words_and_positions")
    if kinds is not None and segments is not None:
        total = write.op("Add", [total, write.op("Gather", [kinds, segments], "segments")], "sum")
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    normal = write.op("LayerNormalization", [total, gamma, beta], "norm", attributes)
    outputs = [normal, None, total]
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        outputs[1] = _ones(write, ids, mask)
        if node.outputs[1].shape is None:
            node.outputs[1].shape = ir.Shape([None])
    write.end(*outputs)
    return ""


def _counted(write: Writer, ids: ir.Value | None) -> ir.Value:
    """0, 1, 2 … for the ids (B, S)."""
    shape = write.op("Shape", [ids], "shape", kind=ir.DataType.INT64)
    length = write.op("Gather", [shape, write.constant(1, "axis")], "length", kind=ir.DataType.INT64)
    return write.op(
        "Range", [write.constant(0, "start"), length, write.constant(1, "step")], "places", kind=ir.DataType.INT64
    )


def _ones(write: Writer, ids: ir.Value | None, mask: ir.Value | None) -> ir.Value:
    """How often the mask (B, S) is 1, as int32 (B,)."""
    source = mask if mask is not None else ids
    one = write.constant(1, "one", np.int32)
    equal = write.op("Equal", [source, one], "is_one", kind=ir.DataType.BOOL)
    if mask is None:
        equal = write.op("And", [equal, write.constant(False, "never", np.bool_)], "no_mask", kind=ir.DataType.BOOL)
    numbers = write.op("Cast", [equal], "numbers", {"to": int(ir.DataType.INT32)}, kind=ir.DataType.INT32)
    axes = write.constant([1], "row")
    return write.op("ReduceSum", [numbers, axes], "lengths", {"keepdims": 0}, kind=ir.DataType.INT32)
