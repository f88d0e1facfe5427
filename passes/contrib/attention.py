"""Attention that exporters write out becomes GroupQueryAttention, or without caches MultiHeadAttention."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.passes.base import Pass, Region
from qcompile.passes.caches import has_caches
from qcompile.passes.contract import Added, Fact, Stage
from qcompile.passes.contrib.around import Around, heads_of
from qcompile.passes.contrib.cuts import packed
from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.masking import Lets, lets
from qcompile.passes.contrib.norms import fuse_norms
from qcompile.passes.contrib.probing import Array
from qcompile.passes.contrib.rotary import Rotated, rotated
from qcompile.passes.contrib.uncached import fuse_uncached
from qcompile.passes.contrib.written import Written, written
from qcompile.passes.graph import MICROSOFT, Names, take_over
from qcompile.passes.prepare.sizes import named_sizes

_STEP = 8  # GroupQueryAttention of ONNX Runtime 1.32 refuses other widths of heads and rotations


class FuseAttention(Pass):
    """Replace attention, and beside caches its rotary embeddings and residual norms, by ONNX Runtime's fused operators.

    Case 1: Softmax(scale q kᵀ + mask) v over caches becomes a GroupQueryAttention. What its mask lets through and how
    positions turn q and k is told by their numbers on small inputs (`probing`), however they are written.
    Case 2: queries, keys and values that one product gives go there without being cut apart.
    Case 3: norms by the root mean square become SimplifiedLayerNormalization, with the sum before them
    SkipSimplifiedLayerNormalization. In decoders with caches alone.
    Case 4: in graphs without caches, as encoders, attention becomes a MultiHeadAttention (`uncached`).

    padding: sequences of a batch may be padded, anywhere: a mask of that is added to the scores, and position_ids are
    looked at (`around.Around.positions`). The operator turns all sequences of a first prompt alike, so position_ids may
    differ by their padding alone; where no mask tells that, queries and keys stay turned as they are.
    Without, a sequence ends where the sum of its attention_mask says, and positions are counted from the begin of the
    caches: the contract of onnxruntime-genai.
    ONNX Runtime takes several rows behind cached ones for one sequence at a time only.
    """

    name: ClassVar[str] = "fuse_attention"
    stage: ClassVar[Stage] = Stage.BEHIND
    needs: ClassVar[Set[Fact]] = frozenset({Fact.CANONICAL, Fact.PARTS})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.FUSED})
    takes: ClassVar[Set[Fact]] = frozenset({Fact.PARTS})
    added: ClassVar[Added | None] = Added(
        "attention",
        "fused",
        Fact.PACKED,
        frozenset({"qcompile", "matmulnbits"}),
        applications={"genai": {"padding": False}},  # which saves a prompt a mask of rows × positions
    )
    unserved: ClassVar[Mapping[str, str]] = {"tensorrt": "has no GroupQueryAttention, leave it out"}

    def __init__(self, *, padding: bool = True) -> None:
        super().__init__()
        self.padding = padding

    def unfit(self, model: ir.Model, feeds: Mapping[str, Array]) -> str:
        """Several rows behind cached ones of several sequences; padding; sequences at other positions each.

        Tokens beside padding have the same logits, but what padding itself gives differs, and is looked at.
        """
        inputs = Inputs.of(model.graph)
        if isinstance(inputs, str):
            return ""
        tokens, past, mask, positions = (
            feeds.get(str(value.name)) if value is not None else None
            for value in (inputs.tokens[0], inputs.pasts[0], inputs.mask, inputs.positions)
        )
        if tokens is None or past is None or tokens.ndim < 2 or past.ndim < 4:
            return ""
        (sequences, rows), cached = tokens.shape[:2], past.shape[2]
        if mask is not None and mask.shape[-1] == cached + rows and not mask.all():  # else it is an encoder's
            return "the data has padding, of which caches and outputs would hold other numbers"
        alike = inputs.mask is not None or not self.padding  # are all sequences turned
        if alike and positions is not None and (positions != positions[:1]).any():
            return "the data has other position_ids in each sequence"
        if sequences > 1 and rows > 1 and cached:
            told = f"the data has {rows} rows behind {cached} cached ones for {sequences} sequences"
            return f"{told}, which GroupQueryAttention takes for one sequence only"
        return ""

    def call(self, region: Region) -> None:
        """Fuse what can be fused, in place."""
        model = region.model
        inputs = Inputs.of(model.graph)
        if isinstance(inputs, str):
            if has_caches(model.graph):
                self.decide("", "kept", inputs)
            else:
                fuse_uncached(model, self.decide)
            return
        fuse_norms(model, self.decide)
        found = self._found(model.graph, inputs)
        if not any(own.lets.padding for own in found):  # then nothing says that it is as long as the caches will be
            inputs = replace(inputs, mask=None)
        around = Around(model.graph, inputs, Names(model), self.padding)
        for own in found:
            _replace(own, around)
            self.decide(own.own.name, "fused", "GroupQueryAttention")
        RemoveUnusedNodesPass()(model)
        left = {node.name for node in model.graph}
        for name, node in around.moved.items():
            if node is not None and name not in left:
                node.name = name
        model.graph.sort()

    def _found(self, graph: ir.Graph, inputs: Inputs) -> "list[_Cached]":
        """The attentions that can be fused; of the others it is decided why not."""
        found: list[_Cached] = []
        masks: dict[tuple[ir.Value | None, bool], Lets | str] = {}
        for own in written(graph):
            if isinstance(own, tuple):
                self.decide(own[0], "kept", own[1])
                continue
            mask = own.mask, own.hides
            if mask not in masks:
                masks[mask] = lets(own, inputs)
            cached = _Cached.of(own, inputs, masks[mask], padding=self.padding)
            if isinstance(cached, str):
                self.decide(own.name, "kept", cached)
            else:
                found.append(cached)
        return found


@dataclass(frozen=True, eq=False)
class _Cached:
    """An attention that GroupQueryAttention computes.

    q, key: before they are turned, (batch, heads or groups, rows, width); value as they; pasts: the caches they go to.
    """

    own: Written
    q: Rotated
    key: Rotated
    value: ir.Value
    pasts: Sequence[ir.Value]
    heads: int
    groups: int
    width: int
    lets: Lets

    @classmethod
    def of(cls, own: Written, inputs: Inputs, through: Lets | str, *, padding: bool) -> "_Cached | str":
        """What is needed of an attention, or why it stays. padding: see `FuseAttention`."""
        key, value = (_appended(present, inputs) for present in (own.k, own.v))
        if key is None or value is None:
            return "its keys and values are not appended to caches"
        if isinstance(through, str):
            return through
        q, k = (rotated(turned, inputs) for turned in (own.q, key[1]))
        if isinstance(q, str) or isinstance(k, str):
            return q if isinstance(q, str) else str(k)
        padded = inputs.mask is not None and through.padding
        apart = padding and inputs.positions is not None and not padded and _batched(inputs)
        if apart or not own.alone:  # what else reads them takes them turned as they are
            q, k = Rotated(own.q), Rotated(key[1])
        if (q.cos, q.sin, q.interleaved) != (k.cos, k.sin, k.interleaved):
            return "its queries and keys are not turned alike"
        if len({value.dtype for value in (q.x, key[0], value[0])}) > 1:
            return "its queries and caches are not of one type"
        groups, width = _heads_and_width(own.k, *key)
        heads = heads_of(q.x, width)
        if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int)):
            return "how many heads it has is not known"
        if _heads_and_width(own.v, *value) != (groups, width):
            told = "values of {} heads of {} beside keys of {} of {}"
            told = told.format(*_heads_and_width(own.v, *value), groups, width)
            return f"GroupQueryAttention takes no {told}"
        if q.pairs % _STEP or width % _STEP:
            told = f"not {width} and {q.pairs}"
            return f"GroupQueryAttention takes heads and halves of rotations in multiples of {_STEP}, {told}"
        return cls(own, q, k, value[1], (key[0], value[0]), heads, groups, width, through)

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        found: dict[str, Any] = {"num_heads": self.heads, "kv_num_heads": self.groups, "scale": self.own.scale}
        if self.q.cos is not None:
            found |= {"do_rotary": 1, "rotary_interleaved": int(self.q.interleaved)}
        found |= {"softcap": self.own.softcap} if self.own.softcap else {}
        return found | ({"local_window_size": self.lets.window} if self.lets.window else {})


def _batched(inputs: Inputs) -> bool:
    """Whether several sequences may come at once."""
    return named_sizes(inputs.tokens[0])[:1] != [1]


def _appended(value: ir.Value, inputs: Inputs) -> tuple[ir.Value, ir.Value] | None:
    """(the cache, what is appended to it) of a value that is an output of the graph."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or not value.is_graph_output() or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    fits = past in inputs.pasts and node.attributes.get_int("axis", 0) in (2, -2)
    return (past, new) if fits and past is not None and new is not None else None


def _heads_and_width(*alike: ir.Value) -> tuple[int | None, int | None]:
    """Those of a cache, as one of the values (batch, heads, rows, width) says that have the same ones."""
    known = [sizes for value in alike if len(sizes := named_sizes(value)) == 4]
    heads, width = (next((n for sizes in known if isinstance(n := sizes[axis], int)), None) for axis in (1, 3))
    return heads, width


def _replace(found: _Cached, around: Around) -> None:
    own, groups, width = found.own, found.groups, found.width
    place = own.result.producer()
    assert place is not None
    around.place = place
    widths = [found.heads * width, groups * width, groups * width]
    parts = [
        around.flat(value, size) for value, size in zip((found.q.x, found.key.x, found.value), widths, strict=True)
    ]
    whole = packed(parts, widths)  # Case 2
    operands: list[ir.Value | None] = [*parts] if whole is None else [whole, None, None]
    operands += [*found.pasts, around.seqlens, around.length, *around.tables(found.q)]
    operands.append(around.bias(found.pasts[0].dtype or ir.DataType.FLOAT) if found.lets.padding else None)
    while operands[-1] is None:
        operands.pop()
    made = ir.node("GroupQueryAttention", operands, found.attributes, domain=MICROSOFT, num_outputs=3, name=own.name)
    place.prepend(made)
    result = made.outputs[0]
    if len(own.result.shape or ()) == 2:
        result.name = around.names.fresh(f"{own.result.name}.wide")
        result = around.op("Reshape", [result, around.constant([-1, widths[0]])], f"{own.result.name}.rows")
    for old, new in zip((own.result, own.k, own.v), (result, *made.outputs[1:]), strict=True):
        take_over(old, new, around.names)
    around.graph.opset_imports[MICROSOFT] = 1
