"""The small passes of `prepare`, in the order in which they run.

Invariant: a small pass that is switched off changes no number. What it does is left undone, and later passes take the
graph as they find it, each node with its reason; where they rely on what it would have done (`ground`), the model must
be so by itself, or is refused.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import onnx_ir as ir

from qcompile.passes.origins import keep_origins, note_origins
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
from qcompile.passes.prepare.infer import infer_anew, infer_new, infer_shapes
from qcompile.passes.prepare.names import unique_names
from qcompile.passes.prepare.opset import raise_opset
from qcompile.passes.prepare.products import turn_products
from qcompile.passes.prepare.scans import number_steps
from qcompile.passes.prepare.simplify import divide, remove_guards, remove_neutral, sign_tables
from qcompile.passes.prepare.sizes import merge_sizes, number_sizes, transpose_keys
from qcompile.passes.prepare.tables import turn_tables
from qcompile.passes.prepare.tidy import inline_functions, name_nodes, remove_traces, remove_unused, sort
from qcompile.passes.prepare.ties import tie_heads


@dataclass(frozen=True)
class Small:
    """One small pass, called like its function.

    function: rewrites a model in place, and takes what it names of `decide`, `opset` and `ask`; a number that it
    returns is that of the nodes it changed. after: small passes that come first where they are on, each with the
    reason. ground: why later code relies on what it does; empty where nothing does. silent: it also does what it does
    not tell. only_after: it runs where one of these changed a node.
    """

    function: Callable[..., object]
    after: Mapping[str, str] = field(default_factory=dict)
    ground: str = ""
    silent: bool = False
    only_after: Sequence[str] = ()

    @property
    def name(self) -> str:
        """As `prepare(without=…)` takes it, and as decisions tell it."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """What it does, in a line: the first of its function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def __call__(self, model: ir.Model, **given: Any) -> object:
        """Rewrite the model in place. given: all that a small pass may take."""
        return self.function(model, **{name: given[name] for name in _taken(self.function)})


@cache
def _taken(function: Callable[..., object]) -> tuple[str, ...]:
    """What a small pass takes beside the model."""
    return tuple(inspect.signature(function).parameters)[1:]


@dataclass(frozen=True)
class Again:
    """A small pass of the list runs once more here, and why. only_after: as a `Small` has it."""

    name: str
    why: str
    only_after: Sequence[str] = ()


_DEAD = "a dead reader would look like a second use"
_COMPUTED = "a computed weight is a constant behind it"
_PRODUCT = "a product is a MatMul behind it"
ORDER: tuple[Small | Again, ...] = (
    Small(sort, ground="nodes are walked in graph order"),
    Small(remove_traces),
    Small(name_nodes, ground="passes, patterns and reports tell nodes by name"),
    Small(inline_functions),
    Again("name_nodes", "what was inlined twice has its names twice"),
    Small(note_origins, after={"name_nodes": "origins are noted by name"}),
    Small(unique_names, ground="constants leave their bodies, and values are looked up by name"),
    Small(fix_defaults),
    Small(load_small),
    Small(
        infer_anew,
        after={
            "unique_names": "inference would take the values of one body for those of another",
            "load_small": "inference looks into axes, shapes and scalars",
        },
        ground="shapes are taken at their word",
        silent=True,
    ),
    Small(
        raise_opset,
        after={"infer_anew": "some rules need ranks"},
        ground="what is written into the graph is of its opset and IR version",
    ),
    Small(lift_constants, after={"unique_names": "names must not meet in the main graph"}),
    Small(remove_identities, after={"infer_anew": "it reads types"}),
    Small(name_casts, after={"infer_anew": "it reads types"}),
    Small(number_steps, after={"lift_constants": "what a Scan goes along has to be an initializer"}),
    Small(remove_unused),
    Small(take_apart, after={"remove_unused": _DEAD}),
    Small(infer_new, only_after=("take_apart",)),
    Small(merge_duplicates),
    Small(report_quantized),
    Small(turn_tables, after={"merge_duplicates": "a copy is a table of its own"}),
    Small(number_sizes, after={"infer_anew": "it reads shapes"}),
    Small(
        fold_constants,
        after={
            "number_sizes": "the ends of a Slice of a weight are numbers behind it",
            "remove_unused": _DEAD,
            "turn_tables": "a Transpose that goes there would be told to stay",
        },
    ),
    Small(split_gemms, after={"fold_constants": _COMPUTED}),
    Small(pair_einsums, after={"fold_constants": _COMPUTED}),
    Small(turn_einsums, after={"pair_einsums": "it takes two operands"}),
    Again("fold_constants", "what these wrote: a turned weight is a constant again"),
    Small(split_experts, after={"fold_constants": _COMPUTED}),
    Again("infer_new", "of the products of each expert", ("split_experts",)),
    Small(turn_products, after={"fold_constants": _COMPUTED, "split_experts": "it leaves weights of a matrix each"}),
    Again("fold_constants", "weights without leading ones, or turned", ("turn_einsums", "turn_products")),
    Again("infer_new", "behind the products", ("turn_einsums", "turn_products")),
    Again("sort", "what several nodes share was written before the first of them that was looked at"),
    Small(tie_heads, after={"fold_constants": _COMPUTED, "split_gemms": "a head may be a Gemm"}),
    Small(divide),
    Small(transpose_keys),
    Small(merge_sizes),
    Small(remove_neutral),
    Small(remove_guards),
    Small(sign_tables),
    Again("remove_unused", _DEAD),
    Small(group_heads, after={"remove_unused": _DEAD}),
    Small(name_hard_swishes),
    Small(fold_convolutions, after={"name_hard_swishes": "a convolution would take its + 3"}),
    Small(merge_equal),
    Small(narrow_doubles, after={"split_gemms": _PRODUCT, "turn_products": _PRODUCT, "turn_einsums": _PRODUCT}),
    Again("remove_unused", "what nothing reads any more is not stored"),
    Again("sort", "later passes rely on it, whatever was written since"),
    Again("name_nodes", "what was written since has names of its own too"),
    Small(note_computed, after={"fold_constants": "it tells why a weight stays computed"}),
    Small(keep_origins, after={"note_origins": "it keeps what was noted", "name_nodes": "origins are found by name"}),
    Small(infer_shapes),
)
SMALL: Mapping[str, Small] = {small.name: small for small in ORDER if isinstance(small, Small)}
