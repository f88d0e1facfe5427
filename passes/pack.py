"""Writing quantized weights into the graph."""

from collections.abc import Callable, Set
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, Quantized
from qcompile.passes.base import Pass, Reason, Region
from qcompile.passes.bodies import body_nodes
from qcompile.passes.contract import Fact
from qcompile.passes.formats import emit
from qcompile.passes.formats.columns import Columns, coded
from qcompile.passes.formats.decoded import Coded
from qcompile.passes.formats.half_scales import are_half
from qcompile.passes.gptq import round_by_rows
from qcompile.passes.graph import is_constant
from qcompile.passes.inner import Chosen, quantize_inner
from qcompile.passes.linears import (
    Embedding,
    Linear,
    as_linear,
    constant,
    find_embeddings,
    find_linears,
    vocabulary_size,
)
from qcompile.passes.policy import Policy, Unfit
from qcompile.passes.qdq.weights import WeightGrid, WeightStore
from qcompile.passes.ranges import ByWeight, Ranges
from qcompile.passes.rounding import blank, round_to_nearest
from qcompile.passes.spec import integers
from qcompile.passes.state import Tensors, node_state, set_node, set_weight, weight_state
from qcompile.passes.targets import TARGETS, TargetName
from qcompile.passes.tensors import read
from qcompile.passes.threads import side_by_side

# A weight as it is packed: its initializer, its spec, and whether it is read transposed.
_Key = tuple[ir.Value, Grid, bool]


class Pack(Pass):
    """Replace float weights by integer codes and scales: MatMul by MatMulInt4, MatMulInt8, …, embeddings by Embedding…

    Case 1: codes chosen by an earlier pass (`gptq`) are written as they are.
    Case 2: with statistics, ranges are clipped by E[x²]-weighted search where that lowers the exact output error; rows
            of few directions have codes as of `gptq` (`round_by_rows`).
    Case 3: otherwise by the weight alone, as `ranges` says: rounding to nearest on the range of each group; of integers
            of 2 and 3 bits on the best of a few fractions of it (`passes/ranges.py`).
    Case 4: a weight that several nodes share, a tied embedding among them, is stored once.
    Case 7: a linear that `outlier` marked: codes of the other channels, and a float product of these (`Columns`).
    target: the operators of the output, as the option --target; None leaves it to that option.
    ranges: how Case 3 chooses, and nothing else (decisions of the other cases say so): nearest, search (fractions of
    the range), hqq (half-quadratic optimization of zero points and scales), best (the better of both); auto: by the
    bits.
    """

    name: ClassVar[str] = "pack"
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.PACKED})
    takes: ClassVar[Set[Fact]] = frozenset({Fact.FLOAT, Fact.CLIP, Fact.CODES, Fact.OUTLIERS, Fact.GROUPS})
    families: ClassVar[tuple[str, ...]] = ("MatMul",)

    def __init__(self, policy: Policy, *, target: TargetName | None = None, ranges: Ranges = "auto") -> None:
        super().__init__()
        self.policy, self.target, self.by_weight = policy, target, ByWeight(ranges)

    def call(self, region: Region) -> None:
        """Rewrite every quantizable node of the region in place; skip the others with a reason."""
        vocabulary = region.vocabulary
        nodes = list(region.live_nodes())
        chosen = [(linear, self.policy.for_linear(linear, vocabulary)) for linear in find_linears(nodes)]
        rounded = self._round(region, {linear: spec for linear, spec in chosen if not isinstance(spec, str)})
        for known in region.statistics.values():  # large, and of no more use
            known.forget()
        passed = {linear: self._passed_over(region, linear) for linear, _ in chosen}
        for linear, spec in chosen:
            if isinstance(spec, str):
                self._keep(linear, spec)
            else:
                told = "; ".join(filter(None, (self.policy.remark(linear, vocabulary), passed[linear])))
                self._pack_linear(region, linear, spec, rounded, told)
        for embedding in find_embeddings(nodes):
            table = self.policy.for_embedding(embedding)
            if isinstance(table, str):
                self._keep(embedding, table)
            else:
                self._pack_embedding(region.model, embedding, table)

    def call_rest(self, model: ir.Model) -> None:
        """Code what no packed product covers (`inner`), and account for the weights that are left.

        Case 5: linears and tables in bodies of If, Loop and Scan: the grid of all others, rounded without data.
        Case 6: convolutions in bodies, LSTM, GRU and RNN: int8, whatever the bits of linears.
        """
        store = WeightStore(model, WeightGrid(), dry=self.dry)
        own, coder = TARGETS[self.policy.target], partial(self._coded, model, vocabulary_size(model))
        runtime = "" if own.decodes else own.runtime
        done = quantize_inner(model, self.policy, store, coder, self.decide, runtime=runtime)
        for embedding in find_embeddings(body_nodes(model)):
            table = self.policy.for_embedding(embedding)
            if isinstance(table, str):
                self._keep(embedding, table)
            else:
                self._pack_embedding(model, embedding, table)
        for node in model.graph.all_nodes():
            name = node.name or ""
            if node.op_type == "MatMul" and node.domain == "" and node not in done:
                reason = as_linear(node)
                if isinstance(reason, str) and (weights := _largest_constant(node)):
                    self.decide(name, "skipped", reason, kind="MatMul", weights=weights)
            elif node.op_type in {"Conv", "ConvTranspose", "Gemm"} and node not in done:
                refused = self.policy.refusal(node, *(value for value in node.inputs if is_constant(value)))
                left = node_state(node).left
                reason = left or f"no packed format for {node.op_type} weights"
                told: dict[str, Any] = {
                    "kind": node.op_type,
                    "weights": _largest_constant(node),
                    "computed": bool(left),
                }
                self.decide(name, "kept" if refused else "skipped", refused or reason, **told)

    def _coded(self, model: ir.Model, vocabulary: int | None, linear: Linear) -> Chosen | str:
        """Case 5: the codes of a linear in a body; those of the main graph where it reads the same weight."""
        spec = self.policy.for_linear(linear, vocabulary)
        if isinstance(spec, str):
            return spec
        spec = integers(spec)
        quantized, own = _stored(
            model, linear.weight, spec, linear.transposed, lambda: self._alone(linear.read(), spec)
        )
        parts = (own.codes, own.scale, own.zero_point)
        return Chosen(
            Coded(*parts, 0, own.block_size, linear.shape, quantized.dequantize), str(spec), own.nbytes, spec.format
        )

    def _alone(self, w: Array, spec: Grid) -> Quantized:
        return blank(w, spec) if self.dry else self.by_weight(w, spec, None)

    def _passed_over(self, region: Region, linear: Linear) -> str:
        """Why `ranges`, where it is given, does not choose a linear's grid (Cases 1 and 2); empty where it does."""
        own, by = self.by_weight.ranges, ""
        if linear.transposed in weight_state(linear.weight).codes:
            by = "the pass before"
        elif region.statistics.get(linear.activation) is not None:
            by = "statistics of its input"
        return f"by {by}, not by ranges={own}, which is for weights without" if by and own != "auto" else ""

    def _keep(self, site: Linear | Embedding, reason: str) -> None:
        kind = "MatMul" if isinstance(site, Linear) else "Gather"
        size, name = int(np.prod(site.shape)), _weight_name(site)
        action = "skipped" if isinstance(reason, Unfit) else "kept"
        self.decide(site.name, action, reason, kind=kind, weights=size, weight=name)

    def _round(self, region: Region, specs: dict[Linear, Grid]) -> dict[_Key, Quantized]:
        """The codes of every weight not packed yet; what `gptq` has not chosen is rounded here, side by side."""
        jobs: dict[_Key, Linear] = {}
        for linear, spec in specs.items():
            if (spec, linear.transposed) not in weight_state(linear.weight).packed:
                jobs.setdefault((linear.weight, spec, linear.transposed), linear)

        def one(key: _Key) -> Quantized:
            linear, spec = jobs[key], key[1]
            if self.dry:
                return blank(linear.read(), spec)
            state = weight_state(linear.weight)
            known = state.codes.get(linear.transposed)
            if known is not None and known.spec == spec:
                return known
            statistics = region.statistics.get(linear.activation)
            if statistics is None:
                return self.by_weight(coded(linear), spec, None)
            if state.clip is False:
                return round_to_nearest(coded(linear), spec, None)
            return round_by_rows(coded(linear), spec, statistics)

        return dict(zip(jobs, side_by_side(one, jobs), strict=True))

    def _pack_linear(
        self, region: Region, linear: Linear, spec: Grid, rounded: dict[_Key, Quantized], told: str
    ) -> None:
        key, columns = (linear.weight, spec, linear.transposed), Columns.of(linear, str(spec))
        quantized, tensors = _stored(region.model, *key, lambda: rounded[key])
        reference = (coded(linear), quantized)
        set_node(linear.node, reference=reference, outliers=None)
        if columns is None:
            emit.replace_matmul(region.model, linear, spec, tensors)
            self._quantized(linear, spec, linear.shape[0], tensors, told)
            return
        outlying, place = columns.outlying(region.model, linear, quantized), region.nodes.index(linear.node)  # Case 7
        emit.replace_matmul(region.model, linear, spec, tensors)
        made = columns.add(region.model, linear, outlying)
        self._quantized(linear, spec, linear.shape[0], tensors, told, columns, constant(outlying).nbytes)
        # The name and what is to be checked go with the packed product.
        made[0].name, linear.node.name = linear.name, f"{linear.name}.sum"
        set_node(made[0], reference=reference)
        set_node(linear.node, reference=None)
        region.nodes[place:place] = made

    def _pack_embedding(self, model: ir.Model, embedding: Embedding, spec: Grid) -> None:
        # A table (V, K) is the transpose of the (K, V) weight that a tied lm_head multiplies with.
        def rounded() -> Quantized:
            return self._alone(read(constant(embedding.table)).T, spec)

        _, tensors = _stored(model, embedding.table, spec, True, rounded)
        emit.replace_embedding(model, embedding, spec, tensors)
        self._quantized(embedding, spec, embedding.shape[1], tensors)

    def _quantized(
        self,
        site: Linear | Embedding,
        spec: Grid,
        k: int,
        tensors: Tensors,
        told: str = "",
        columns: Columns | None = None,
        extra: int = 0,
    ) -> None:
        """extra: bytes of what stays in float."""
        added = columns.extra_bits(site) if columns is not None and isinstance(site, Linear) else 0.0
        saved = constant(tensors.scale).nbytes // 2 if self.policy.half_scales and are_half(tensors.scale) else 0
        added -= 8 * saved / max(int(np.prod(site.shape)), 1)
        self.decide(
            site.name,
            "quantized",
            Reason(str(columns or spec), told),
            format=spec.format,
            kind="MatMul" if isinstance(site, Linear) else "Gather",
            weights=int(np.prod(site.shape)),
            weight=_weight_name(site),
            bytes=tensors.nbytes + extra - saved,
            bits_per_weight=spec.bits_per_weight(k) + added,
        )


def _stored(
    model: ir.Model, weight: ir.Value, spec: Grid, transposed: bool, rounded: Callable[[], Quantized]
) -> tuple[Quantized, Tensors]:
    """Case 4: the codes of a weight, stored for the first one that reads it so; those chosen before are used up."""
    known = weight_state(weight)
    if (spec, transposed) not in known.packed:
        quantized = rounded()
        made = (quantized, emit.store(model, str(weight.name), quantized))
        left = {turned: codes for turned, codes in known.codes.items() if turned != transposed}
        set_weight(weight, codes=left, packed={**known.packed, (spec, transposed): made})
        return made
    return known.packed[spec, transposed]


def _largest_constant(node: ir.Node) -> int:
    """Elements of the largest constant that a node reads."""
    return max((constant(v).size for v in node.inputs if v is not None and is_constant(v)), default=0)


def _weight_name(site: Linear | Embedding) -> str:
    return str((site.weight if isinstance(site, Linear) else site.table).name)
