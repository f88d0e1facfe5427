"""Attention without caches, as encoders have it, becomes MultiHeadAttention of ONNX Runtime."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.passes.contrib.around import Around, heads_of
from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.masking import hides_nothing
from qcompile.passes.contrib.written import Written, written
from qcompile.passes.graph import MICROSOFT, Decide, Names, take_over
from qcompile.passes.prepare.sizes import named_sizes

_NOTHING = Inputs((), (), None, None)


def fuse_uncached(model: ir.Model, decide: Decide) -> None:
    """Softmax(scale q kᵀ + mask) v becomes a MultiHeadAttention, in place, wherever it is said what it adds.

    Whatever is added to the scores is added by it: a mask of padding, causal or not, biases by position. What a Where
    puts in place of scores is added as the lowest float. Without either, and where a mask hides nothing whatever the
    inputs hold, ONNX Runtime's CPU provider never has the scores of all rows at once.
    """
    around, fused = Around(model.graph, _NOTHING, Names(model), padding=False), False
    for own in list(written(model.graph)):
        if isinstance(own, tuple):
            decide(own[0], "kept", own[1])
            continue
        found = _Uncached.of(own)
        if isinstance(found, str):
            decide(own.name, "kept", found)
        else:
            _replace(found, around)
            decide(own.name, "fused", "MultiHeadAttention")
            fused = True
    if fused:
        RemoveUnusedNodesPass()(model)
        model.graph.sort()


@dataclass(frozen=True, eq=False)
class _Uncached:
    """An attention that MultiHeadAttention computes. widths: of a head of queries and keys, and of values."""

    own: Written
    heads: int
    widths: tuple[int, int]

    @classmethod
    def of(cls, own: Written) -> "_Uncached | str":
        """What is needed of an attention, or why it stays."""
        if own.guarded:
            return "MultiHeadAttention has no zeros for rows that nothing is let through to"
        if own.softcap:
            return "MultiHeadAttention has no softcap"
        kinds = {value.dtype for value in (own.q, own.k, own.v, own.result)}
        if kinds != {ir.DataType.FLOAT} or (own.mask and own.mask.dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL)):
            return "not all of it is float32"
        sizes = [named_sizes(value) for value in (own.q, own.k, own.v)]
        if any(len(size) != 4 for size in sizes):
            return "how many heads it has is not known"
        widths = [size[3] if isinstance(size[3], int) else None for size in sizes]
        heads = {heads_of(value, width) for value, width in zip((own.q, own.k, own.v), widths, strict=True)}
        count, (width, _, own_width) = heads.pop(), widths
        if count is None or width is None or own_width is None or None in heads:
            return "how many heads it has is not known"
        return "its keys have fewer heads than its queries" if heads else cls(own, count, (width, own_width))


def _replace(found: _Uncached, around: Around) -> None:
    own, heads = found.own, found.heads
    place = own.result.producer()
    assert place is not None
    around.place = place
    widths = [heads * width for width in (found.widths[0], *found.widths)]
    operands: list[ir.Value | None] = [
        around.flat(value, size) for value, size in zip((own.q, own.k, own.v), widths, strict=True)
    ]
    if own.mask is not None and not hides_nothing(own.mask, around.graph, hides=own.hides):
        operands += [None, None, _bias(own, own.mask, around)]
    attributes = {"num_heads": heads, "scale": own.scale}
    made = ir.node("MultiHeadAttention", operands, attributes, domain=MICROSOFT, name=own.name)
    place.prepend(made)
    result = made.outputs[0]
    if len(own.result.shape or ()) == 2:
        result.name = around.names.fresh(f"{own.result.name}.wide")
        result = around.op("Reshape", [result, around.constant([-1, widths[2]])], f"{own.result.name}.rows")
    take_over(own.result, result, around.names)
    around.graph.opset_imports[MICROSOFT] = 1


def _bias(own: Written, mask: ir.Value, around: Around) -> ir.Value:
    """attention_bias, (batch or 1, heads or 1, rows, positions), which is not broadcast along the last two."""
    if mask.dtype == ir.DataType.BOOL:
        zero, low = (around.constant(number, np.float32) for number in (0.0, float(np.finfo(np.float32).min)))
        mask = around.op("Where", [mask, *((low, zero) if own.hides else (zero, low))], f"{own.name}.mask")
    lengths = [
        around.op("Shape", [value], f"{own.name}.{name}", start=2, end=3)
        for value, name in ((own.q, "rows"), (own.k, "positions"))
    ]
    shape = around.op("Concat", [around.constant([1, 1]), *lengths], f"{own.name}.bias_shape", axis=0)
    return around.op("Expand", [mask, shape], f"{own.name}.bias")
