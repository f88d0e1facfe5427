"""Which weight is quantized to what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.exact import unquoted
from qcompile.passes.linears import Embedding, Linear, constant, is_lm_head
from qcompile.passes.masks import holds_fill
from qcompile.passes.origins import matches, names_of
from qcompile.passes.rotation import MATRIX
from qcompile.passes.routers import router
from qcompile.passes.spec import PerGroup, integers
from qcompile.passes.state import node_state
from qcompile.passes.targets import TARGETS
from qcompile.passes.tensors import largest

# Scales by the type of the weight.
_SCALES = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


class Unfit(str):
    """Why a weight stays in float that the user did not keep there: it is skipped."""


@dataclass(frozen=True)
class Policy:
    """The user's choice, applied to one weight at a time.

    body: grid of ordinary linears; of few bits, routers of experts get 8. lm_head, embedding: their own grid, or None
    to keep them in float.
    named: grids, or None for float, of weights that patterns fit, instead of these; the first that fits counts.
    tables: by pattern of `named`, the grid of a table of lookups, where it is another one.
    include, exclude: shell patterns on names of nodes and weights, those of the source among them, or operators;
    exclude wins. kept: nodes that stay in float, and why.
    weights_only: products whose weight alone becomes int8 where others compute in integers, and why.
    target: that of the file; some take whole blocks alone, or no 8 bits (`targets.py`). half_scales: float16 in the
    file, where they are float16 numbers.
    blank: no weight is read: what only its numbers tell of a grid, and no size depends on, is left out.
    """

    body: Grid
    lm_head: Grid | None
    embedding: Grid | None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    named: Sequence[tuple[str, Grid | None]] = ()
    tables: Mapping[str, Grid] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    weights_only: Mapping[str, str] = field(default_factory=dict)
    target: str = "qcompile"
    half_scales: bool = False
    blank: bool = False

    def for_linear(self, linear: Linear, vocabulary: int | None) -> Grid | str:
        """The spec of a linear, or the reason why it stays in float."""
        if (part := node_state(linear.node).grid) is not None:
            return part
        refusal = self.refusal(linear.node, linear.weight)
        if refusal:
            return refusal
        own = self._meant(linear, vocabulary)
        return own if isinstance(own, str) else self._in_blocks(self._typed(own, linear.weight), linear.shape[0])

    def _meant(self, linear: Linear, vocabulary: int | None) -> Grid | str:
        """The grid that the user's choice gives a linear, whatever its type and size."""
        if own := self.of(linear.node, linear.weight):
            return own
        if is_lm_head(linear, vocabulary):
            return self.lm_head or "lm_head is kept in float"
        remark = self.remark(linear, vocabulary)
        return self._eight(remark) if remark else self.body

    def of(self, node: ir.Node, *weights: ir.Value | None) -> Grid | None:
        """The grid of weights that a pattern of `named` fits first; None where none does, or they stay in float."""
        return self._fitting(node, *weights)[1]

    def _fitting(self, node: ir.Node, *weights: ir.Value | None) -> tuple[str, Grid | None]:
        return next((own for own in self.named if matches(own[0], node, *weights)), ("", None))

    def _typed(self, spec: Grid, weight: ir.Value) -> Grid | str:
        return typed(spec, weight, read=not self.blank)

    def _eight(self, remark: str) -> Grid | str:
        """The grid of weights that need 8 bits."""
        own = TARGETS[self.target]
        if 8 not in own.bits:
            return Unfit(f"{remark}, and {own.runtime} has {own.bits[-1]} bits for weights alone")
        eight = self.body.eight()
        return replace(integers(eight), symmetric=True) if own.symmetric else eight

    def _in_blocks(self, spec: Grid | str, k: int) -> Grid | str:
        """The spec in blocks of which the target takes k rows: where it has no partial ones, such as divide k."""
        own = TARGETS[self.target]
        if isinstance(spec, str) or not own.symmetric or not k % spec.group_size(k):
            return spec
        size = spec.group_size(k)
        while size > own.least and k % size:
            size //= 2
        if k % size or size < own.least:
            return Unfit(f"{own.runtime} takes whole blocks, and {k} rows are no multiple of {own.least}")
        return replace(integers(spec), granularity=PerGroup(size))

    def remark(self, linear: Linear, vocabulary: int | None) -> str:
        """Why a linear has 8 bits where others have 4, or an empty string: it is a router that `include` does not name.

        Naming is by the very name of the node or its weight; a pattern that fits others, too, is not meant for it.
        """
        if self.of(linear.node, linear.weight):
            return ""
        if self.body.fine or self._included(linear):
            return ""
        return router(linear, vocabulary)

    def _included(self, linear: Linear) -> bool:
        names = names_of(linear.node, linear.weight)
        return any(own in names or unquoted(own) == linear.weight.name for own in self.include)

    def for_embedding(self, embedding: Embedding) -> Grid | str:
        """The spec of an embedding table, or the reason why it stays in float; one that is a mask does."""
        pattern, named = self._fitting(embedding.node, embedding.table)
        own, target = self.tables.get(pattern, named) or self.embedding, TARGETS[self.target]
        if own is not None and holds_fill(embedding.table):
            return "its table holds the fill of a mask (-1e4, -inf), which no grid serves"
        refusal = self.refusal(embedding.node, embedding.table)
        if refusal or own is None:
            return refusal or "embedding is kept in float"
        if not target.decodes:
            return Unfit(f"{target.runtime} takes constant scales alone, and those of a lookup are not")
        return self._typed(own, embedding.table)

    def refusal(self, node: ir.Node, *weights: ir.Value | None) -> str:
        """Why a node with these weights is not to be quantized, or an empty string."""
        if any(weight is not None and str(weight.name).startswith(MATRIX) for weight in weights):
            return "it turns the channels of products' inputs"  # a file that was compiled before, for other runtimes
        excluded = self.kept.get(str(node.name), "") or self.exclusion(node, *weights)
        pattern, own = self._fitting(node, *weights)
        if pattern and own is None and not excluded:
            return f"kept in float by {pattern!r}"
        if excluded or any(matches(pattern, node, *weights) for pattern in self.include):
            return excluded
        return "not among the included names"

    def exclusion(self, node: ir.Node, *weights: ir.Value | None) -> str:
        """The same by `exclude` alone, which also keeps nodes without a weight in float."""
        found = (pattern for pattern in self.exclude if matches(pattern, node, *weights))
        return next((f"excluded by {pattern!r}" for pattern in found), "")


def typed(spec: Grid, weight: ir.Value, *, read: bool = True) -> Grid | str:
    """The spec with scales of the weight's float type; a reason where the formats have none.

    The operands of a product are of one type, so this is the type of the activation that the weight meets, whatever
    other weights of the model are. read: whether the weight's numbers may be, for a grid that depends on them.
    """
    scale = _SCALES.get(constant(weight).dtype)
    if scale is None:
        return f"no format for {constant(weight).dtype.name.lower()} weights"
    own = spec.typed(scale)
    return own.ranged(lambda: _largest(weight)) if read else own


def _largest(weight: ir.Value) -> float:
    """The largest magnitude of a constant; infinite or NaN where it holds such."""
    return largest(constant(weight))
