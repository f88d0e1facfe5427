"""The pass itself: its steps, in order."""

from collections.abc import Set
from typing import ClassVar

from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import WEIGHTS, Fact, Stage
from qcompile.passes.errors import UserError
from qcompile.passes.origins import keep_origins, origins
from qcompile.passes.prepare.constants import fix_defaults, lift_constants, load_small
from qcompile.passes.prepare.contrib import take_apart
from qcompile.passes.prepare.convolutions import fold_convolutions
from qcompile.passes.prepare.doubles import narrow_doubles
from qcompile.passes.prepare.duplicates import merge_duplicates
from qcompile.passes.prepare.einsum import pair_einsums, turn_einsums
from qcompile.passes.prepare.equal import merge_equal
from qcompile.passes.prepare.experts import split_experts
from qcompile.passes.prepare.folding import fold_constants, note_computed, report_quantized
from qcompile.passes.prepare.gemm import split_gemms
from qcompile.passes.prepare.hard_swish import name_hard_swishes
from qcompile.passes.prepare.heads import group_heads
from qcompile.passes.prepare.identities import name_casts, remove_identities
from qcompile.passes.prepare.infer import infer_anew, infer_shapes
from qcompile.passes.prepare.names import unique_names
from qcompile.passes.prepare.opset import MAX_OPSET, MIN_OPSET, raise_opset
from qcompile.passes.prepare.products import turn_products
from qcompile.passes.prepare.scans import number_steps
from qcompile.passes.prepare.simplify import divide, remove_guards, remove_neutral, sign_tables
from qcompile.passes.prepare.sizes import merge_sizes, number_sizes, transpose_keys
from qcompile.passes.prepare.tables import turn_tables
from qcompile.passes.prepare.tidy import inline_functions, name_nodes, remove_traces, remove_unused, sort
from qcompile.passes.prepare.ties import tie_heads


class Prepare(Pass):
    """Canonicalize the graph: opset 21, weights as initializers, Gemm as MatMul and Add, no copies.

    Case 1: nodes are sorted and get names of their own; the exporter's stack traces are removed; model-local functions
            are inlined, but for qcompile's. What the source calls each node and its weights is kept (`origins`).
    Case 2: an initializer that is a graph input too (a default value) becomes a constant; small external tensors are
            read; Constant nodes of the main graph become initializers.
    Case 3: an opset below `opset` is raised to it, in subgraphs too; impossible for an operator: UserError.
    Case 4: Identity and Dropout are bypassed; CastLike becomes Cast.
    Case 5: equal initializers over 1 KiB become one, and a linear that is an embedding turned round becomes its
            Transpose: what an exporter copied is tied again.
    Case 6: what is computed from constants alone, and sizes that are numbers (a Transpose, Cast or Slice of a weight,
            LoRA's sum, the norm of weight normalization) becomes a constant, lazily, where that does not make the model
            larger. A weight that others use as it is (a tied embedding) keeps its one copy, and the Transpose stays.
    Case 7: a Gemm with constant weight becomes MatMul and Add.
    Case 8: what no output needs is removed, and shapes are inferred again.
    Case 9: every value has a name of its own, in bodies of If, Loop and Scan too; their weights become initializers of
            the main graph, and Cases 5 to 7 hold for what reads them there. A Scan along a constant looks it up.
    Case 10: x * (1 / d) becomes x / d, so that runtimes see the end of a normalization.
    Case 11: Reshape, Transpose, Reshape that turn the last two axes become one Transpose.
    Case 12: what is computed twice is computed once. Dimensions of graph inputs with one name are one size.
    Case 13: a guard against a softmax of nothing but -inf goes where the mask is finite. NaN scores then give NaN.
    Case 14: a constant operand that changes nothing (and True, times 1, plus 0) goes with its node.
    Case 15: the signs that rotary embeddings put on halves of q and k go into the table that all of them share.
    Case 16: grouped-query attention reads each head of keys and values once for its group, where Expand copied it.
    Case 17: BatchNormalization, and Add, Sub, Mul and Div by constants of a channel, go into the Conv before them.
    Case 18: x * Clip(x + 3, 0, 6) / 6 and the like become HardSwish; without the first x, HardSigmoid.
    Case 19: an Einsum that is a product with a constant weight, W x, and weights (1, …, K, N) become MatMul by (K, N).
            An Einsum of several operands, weights among them, becomes Einsums of two first.
    Case 20: FusedMatMul, FusedGemm, FusedConv, Attention and EmbedLayerNormalization of ONNX Runtime's domain become
            what they were fused from, so that their weights are those of a MatMul, Conv or Gather.
    Case 21: a product with one matrix for each expert becomes one product for each.
    Case 22: a product by a float64 weight, and a lookup in such a table, are computed in float32 between Casts.
    Case 23: a table that lookups read through Transposes, or by columns, is stored by the rows that they look up.
    Cases 11 to 16, 21, 23 keep the arithmetic, but for NaN scores in Case 13; Cases 10, 17, 18 round elsewhere or less.
    Inputs and outputs keep names, order and types; weights keep their types and are never all in memory.
    """

    name: ClassVar[str] = "prepare"
    stage: ClassVar[Stage] = Stage.BEFORE
    needs: ClassVar[Set[Fact]] = frozenset()
    ensures: ClassVar[Set[Fact]] = WEIGHTS

    def __init__(self, *, opset: int = 21) -> None:
        super().__init__()
        if not MIN_OPSET <= opset <= MAX_OPSET:
            raise UserError(f"prepare: opset must be {MIN_OPSET} to {MAX_OPSET}, got {opset}")
        self.opset = opset

    def call(self, region: Region) -> None:
        """Rewrite the whole model in place."""
        model, decide = region.model, self.decide
        sort(model)  # Case 1
        remove_traces(model, decide)
        name_nodes(model, decide)
        inline_functions(model, decide)
        name_nodes(model, decide)
        known = origins(model)
        unique_names(model, decide)  # Case 9
        fix_defaults(model, decide)  # Case 2
        load_small(model)
        infer_anew(model, decide, region.ask)
        raise_opset(model, self.opset, decide)  # Case 3
        lift_constants(model, decide)  # Case 2
        remove_identities(model, decide)  # Case 4
        name_casts(model, decide)
        number_steps(model, decide)  # Case 9
        remove_unused(model, decide)  # so that a dead user does not look like a shared weight
        if take_apart(model, decide):  # Case 20
            infer_shapes(model, decide)
        merge_duplicates(model, decide)  # Case 5
        report_quantized(model, decide)
        turn_tables(model, decide)  # Case 23
        number_sizes(model, decide)  # Case 6
        fold_constants(model, decide)
        split_gemms(model, decide)  # Case 7
        pair_einsums(model, decide)  # Case 19
        turned = turn_einsums(model, decide)  # Case 19
        fold_constants(model, decide)  # Case 6, what the two before wrote
        if split_experts(model, decide):  # Case 21
            infer_shapes(model, decide)
        if turn_products(model, decide) + turned:  # Case 19
            fold_constants(model, decide)
            infer_shapes(model, decide)
        sort(model)
        tie_heads(model, decide)  # Case 5
        divide(model, decide)  # Case 10
        transpose_keys(model, decide)  # Case 11
        merge_sizes(model, decide)  # Case 12
        remove_neutral(model, decide)  # Case 14
        remove_guards(model, decide)  # Case 13
        sign_tables(model, decide)  # Case 15
        remove_unused(model, decide)  # so that a dead reader does not look like a second use
        group_heads(model, decide)  # Case 16
        name_hard_swishes(model, decide)  # Case 18, before a convolution takes the + 3
        fold_convolutions(model, decide)  # Case 17
        merge_equal(model, decide)  # Case 12
        narrow_doubles(model, decide)  # Case 22
        remove_unused(model, decide)  # Case 8
        sort(model)
        name_nodes(model, decide)
        note_computed(model)
        keep_origins(model, known)
        infer_shapes(model, decide, region.ask)
        region.nodes = list(model.graph)
