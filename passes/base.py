"""What a pass is: parameters in the constructor, one `call` on a region, decisions left behind."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.contract import WEIGHTS, Added, Fact, Reads, Stage
from qcompile.passes.linears import Linear, find_linears, vocabulary_size
from qcompile.passes.observers.base import Observer
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import Rounding, round_to_nearest
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.statistics import Statistics

# Tells the types of values, by name, that a model without its weights computes; nothing of those it cannot tell.
Oracle = Callable[[onnx.ModelProto, Sequence[str]], Sequence[onnx.ValueInfoProto]]

# `Decision.format` of a node whose activations are integers on a grid that calibration fixed.
STATIC = "static"


class Reason(str):
    """Why, of which a part is said of one node alone. alike: the other part, by which nodes are counted."""

    alike: str

    def __new__(cls, alike: str, own: str = "") -> "Reason":
        made = super().__new__(cls, f"{alike}: {own}" if own else alike)
        made.alike = alike
        return made


@dataclass(frozen=True)
class Decision:
    """What a pass did with a node, and why: `action` is a past participle ("quantized", "folded", "skipped", ...).

    format: the name of the weight format (passes/formats) of a quantized node, or STATIC; "" where it is another one.
    """

    node: str
    action: str
    reason: str
    detail: dict[str, Any] = field(default_factory=dict)
    format: str = ""

    @property
    def told(self) -> str:
        """The format of a quantized node; why another one stays in float."""
        return self.reason if self.action == "quantized" else f"float: {self.reason}"

    @property
    def group(self) -> str:
        """The same for a count of nodes, without what is said of one node alone."""
        reason = self.reason.alike if isinstance(self.reason, Reason) else self.reason
        return reason if self.action == "quantized" else f"float: {reason}"


@dataclass
class Region:
    """The part of a model a pass works on: the whole graph, or one segment of it with its statistics.

    nodes: the region's nodes in topological order; nodes outside it must not change.
    statistics: by activation value; empty when the pipeline runs without calibration.
    vocabulary: rows of the model's largest embedding table, None without one; looked up where it is not given.
    ask: a runtime's answer to what types and shapes values have, where one is there to be asked.
    loose: with the first region, nodes of none: what follows from inputs without large weights, and is computed again
    wherever it is read. They stay; their constants may change with those of the region where no number that others
    read does.
    """

    model: ir.Model
    nodes: list[ir.Node]
    statistics: dict[ir.Value, Statistics] = field(default_factory=dict)
    vocabulary: int | None = -1
    ask: Oracle | None = None
    loose: Sequence[ir.Node] = ()

    def __post_init__(self) -> None:
        if self.vocabulary == -1:
            self.vocabulary = vocabulary_size(self.model)

    @classmethod
    def whole(cls, model: ir.Model, ask: Oracle | None = None) -> "Region":
        """The whole main graph, without statistics."""
        return cls(model, list(model.graph), ask=ask)

    def live_nodes(self) -> Iterator[ir.Node]:
        """The region's nodes that are still in the graph."""
        return (node for node in self.nodes if node.graph is self.model.graph)


class Pass(ABC):
    """One rewrite. Its docstring's first line is what `qcompile passes` prints; what it declares is in `contract`.

    name: how a recipe calls it.
    stage: when it runs. reads: what it cannot work without of the calibration data.
    needs: what must hold of the model that it is given. ensures: what it makes true. takes: what it ends, where it
    holds; who takes the float weights quantizes.
    prefers: what it works better with: a pass that lists have added and that ensures this comes before it.
    families: of these it quantizes all weights it can, "MatMul" (and what multiplies like it) or "Conv": coverage of
    them is asked for where the user names no minimum.
    added: when lists have it that do not name it; None: never.
    unserved: targets whose runtime does not run what it writes, and what it lacks.
    observer: by which ranges of activations are chosen, in a pass that reads them.
    dry: it is asked what it would do alone: codes and scales may be blank, and it takes no ranges; for the sizes.
    decided: what data decides of it that changes a graph's nodes, in words; dry runs tell it.
    turns: whether it rotates inputs of products, and their weights as much.
    parts: the small passes that it is a list of, in their order, each with a line on what it does.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.WALK
    reads: Set[Reads] = frozenset()
    needs: ClassVar[Set[Fact]] = WEIGHTS
    ensures: ClassVar[Set[Fact]] = frozenset()
    takes: ClassVar[Set[Fact]] = frozenset()
    prefers: ClassVar[Set[Fact]] = frozenset()
    families: ClassVar[Sequence[str]] = ("MatMul", "Conv")
    added: ClassVar[Added | None] = None
    unserved: ClassVar[Mapping[str, str]] = {}
    observer: str = ""
    dry: bool = False
    decided: ClassVar[str] = ""
    turns: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    @property
    def rounds_by(self) -> Rounding | None:
        """The rounding of weights that begins with this pass, for passes before it to judge candidates by."""
        return None

    @property
    def activation_grid(self) -> ActivationSpec | None:
        """The grid that it rounds activations to, if it does."""
        return None

    def refuses_codes(self, linear: Linear) -> str:
        """Why a pass that takes codes would not store those that one before it chooses for a linear; empty if it would.

        Asked before they are chosen, for linears that are to be quantized.
        """
        return ""

    @property
    def fused(self) -> bool:
        """Whether ONNX Runtime's CPU provider may optimize the graph that it leaves, in checks."""
        return True

    @property
    def chosen_ranges(self) -> dict[ir.Value, tuple[float, float]]:
        """(low, high) of the grid of every activation that the pass rounds to a fixed one."""
        return {}

    def observed(self, model: ir.Model) -> dict[ir.Value, Observer]:
        """Observers that are to see the activations of the model before the pass runs; filled when `call` begins."""
        return {}

    def observed_in(self, region: Region) -> Mapping[ir.Value, Observer]:
        """More observers of a region, as the walk's passes leave it; filled before the next region is rewritten.

        Asked for once a region, where a pass of the list reads ranges; of those that read them themselves only where
        these come from this run, not from a file. That is when activations turn up that were not there when `observed`
        was asked: behind a Mul that came before a linear, say.
        """
        return {}

    def watched(self, region: Region) -> Mapping[ir.Value, Observer]:
        """Observers that are to see a region's activations before the passes of the walk rewrite it; filled when `call`
        begins, and asked for only where it reads CHANNELS and there is data.
        """
        return {}

    def unfit(self, model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> str:
        """Why the graph that it makes of the model could not take these inputs, by name; empty where it can."""
        return ""

    def on_copy(self, values: Mapping[str | None, ir.Value]) -> Self:
        """The pass for a copy of the model, with nothing decided; `values`: those of the copy, by name."""
        made = copy.copy(self)
        made.decisions = []
        return made

    @abstractmethod
    def call(self, region: Region) -> None:
        """Rewrite the region in place and append to `decisions`."""

    def call_rest(self, model: ir.Model) -> None:  # noqa: B027  # few passes have anything to do there
        """Behind the walk, once: rewrite what no segment has, in a pass of the walk."""

    def decide(self, node: str, action: str, reason: str, *, format: str = "", **detail: Any) -> None:
        """Leave one decision behind."""
        self.decisions.append(Decision(node, action, reason, detail, format))

    def quantized_inputs(self, region: Region, policy: Policy) -> dict[ir.Value, dict[Linear, Grid]]:
        """The linears of a region that are quantized, with their grids, by what they read; of others it says why."""
        inputs: dict[ir.Value, dict[Linear, Grid]] = {}
        vocabulary = region.vocabulary
        for linear in find_linears(region.live_nodes()):
            spec = policy.for_linear(linear, vocabulary)
            if isinstance(spec, str):
                self.decide(linear.name, "skipped", spec)
            else:
                inputs.setdefault(linear.activation, {})[linear] = spec
        return inputs


@dataclass(frozen=True)
class IntegerNodes:
    """What of a float model a pass would compute in integers.

    nodes: in order. whole: activations that every reader takes from behind their Q and DQ. moving: nodes that only move
    codes, and are integer where their neighbours are. ends: by node, the value of `whole` that it alone needs.
    """

    nodes: Sequence[ir.Node]
    whole: Set[ir.Value] = frozenset()
    moving: Set[ir.Node] = frozenset()
    ends: Mapping[ir.Node, ir.Value] = field(default_factory=dict)


class IntegerPass(Pass):
    """A pass behind the walk that makes nodes integer, of which the user may keep any in float (`policy.kept`).

    Weights are rounded to nearest.
    """

    stage: ClassVar[Stage] = Stage.BEHIND
    takes: ClassVar[Set[Fact]] = frozenset({Fact.FLOAT, Fact.CODES, Fact.OUTLIERS, Fact.PARTS})
    policy: Policy

    @property
    def rounds_by(self) -> Rounding:
        """To nearest."""
        return round_to_nearest

    @property
    def light(self) -> bool:
        """Whether a MatMul whose weight alone is int8 runs faster than a float one where the model is to run."""
        return True

    @abstractmethod
    def integer_nodes(self, model: ir.Model, policy: Policy) -> IntegerNodes:
        """What the pass would make integer under a policy; lookups in tables are left out."""


P = TypeVar("P", bound=Pass)


class WalksAgain(Pass):
    """A pass behind the walk that fits to what the graph as it is makes of the calibration data.

    It does so on a copy of the model first (`on_copy`), from a part of the data (`hold_aside`). Where the outputs on
    the others do not confirm it, it is refused, else it `walk_again`s with all data.
    """

    stage: ClassVar[Stage] = Stage.BEHIND
    reads: Set[Reads] = frozenset({Reads.OUTPUTS})

    @abstractmethod
    def walk_again(self, region: Region) -> Iterator[Mapping[ir.Value, Observer]]:
        """Observers of a segment of the graph as the pass finds it behind the walk, before `call`.

        The pass may change the graph between two sets: each is filled before the next one is asked for, and the
        calibration data goes on through the segment as it is left.
        """

    @abstractmethod
    def hold_aside(self, every: int) -> None:
        """Fit to the parts 0 and 2 of the data alone (see `Mean`); one of so many batches is shown to observers."""

    @abstractmethod
    def refuse(self, reason: str, tried: Sequence[Decision]) -> None:
        """Change nothing. tried: what the pass decided on the copy; empty where there was no data to judge it."""


def contradiction(kind: type[Pass]) -> str:
    """What a kind of pass declares that is not so, or does that it does not declare; empty where it is at one."""
    ranges, outputs = (what in kind.reads for what in (Reads.RANGES, Reads.OUTPUTS))
    if ranges != (kind.observed is not Pass.observed):
        return f"it {'reads' if ranges else 'does not read'} RANGES and has {'no' if ranges else 'a'} method `observed`"
    if (Reads.CHANNELS in kind.reads) != (kind.watched is not Pass.watched):
        return "what it reads of CHANNELS and its method `watched` do not go together"
    if outputs != issubclass(kind, WalksAgain):
        return f"it {'reads' if outputs else 'does not read'} OUTPUTS and is {'no' if outputs else 'a'} WalksAgain"
    if kind.stage != Stage.WALK and kind.reads & {Reads.SCALES, Reads.STATISTICS, Reads.CHANNELS}:
        return "it reads statistics, which come with segments, and its stage is not WALK"
    if kind.stage != Stage.WALK and kind.call_rest is not Pass.call_rest:
        return "it has a method `call_rest`, which comes behind the walk, and its stage is not WALK"
    return ""


def values_by_name(model: ir.Model) -> dict[str | None, ir.Value]:
    """What the nodes of the main graph read and give."""
    return {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}


def on_clone(late: P, model: ir.Model) -> tuple[P, ir.Model]:
    """A copy of a pass behind the walk, and a copy of the model that it is about to rewrite; weights are shared."""
    clone = model.clone()
    return late.on_copy(values_by_name(clone)), clone
