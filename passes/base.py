"""What a pass is: parameters in the constructor, one `call` on a region, decisions left behind."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.passes.linears import vocabulary_size
from qcompile.passes.observers.base import Observer
from qcompile.passes.statistics import Statistics

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
    """

    model: ir.Model
    nodes: list[ir.Node]
    statistics: dict[ir.Value, Statistics] = field(default_factory=dict)
    vocabulary: int | None = -1

    def __post_init__(self) -> None:
        if self.vocabulary == -1:
            self.vocabulary = vocabulary_size(self.model)

    @classmethod
    def whole(cls, model: ir.Model) -> "Region":
        """The whole main graph, without statistics."""
        return cls(model, list(model.graph))

    def live_nodes(self) -> Iterator[ir.Node]:
        """The region's nodes that are still in the graph."""
        return (node for node in self.nodes if node.graph is self.model.graph)


class Pass(ABC):
    """One rewrite. Its docstring's first line is what `qcompile passes` prints.

    name: how a recipe calls it.
    whole_model: it runs once over the whole graph, before the model is walked segment by segment.
    after_walk: it runs once over the whole packed graph, behind the walk.
    needs_statistics: it cannot work without the Gram matrices of linears' inputs.
    needs_correlations: statistics guessed channel by channel (`proxies`) are no use to it.
    walks_again: the calibration data goes through the graph once more for it, see `WalksAgain`.
    quantizes: its decisions say which weights became codes; coverage is counted from them.
    families: of these it quantizes all weights it can, "MatMul" (and what multiplies like it) or "Conv": coverage of
    them is asked for where the user names no minimum.
    followed_by, preceded_by: names of passes of which one must come later, or earlier, in the list.
    """

    name: ClassVar[str]
    whole_model: ClassVar[bool] = False
    after_walk: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = False
    needs_correlations: ClassVar[bool] = False
    walks_again: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    families: ClassVar[Sequence[str]] = ("MatMul", "Conv")
    followed_by: ClassVar[Sequence[str]] = ()
    preceded_by: ClassVar[Sequence[str]] = ()

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    @property
    def chosen_ranges(self) -> dict[ir.Value, tuple[float, float]]:
        """(low, high) of the grid of every activation that the pass rounds to a fixed one."""
        return {}

    def observed(self, model: ir.Model) -> dict[ir.Value, Observer]:
        """Observers that are to see the activations of the model before the pass runs; filled when `call` begins."""
        return {}

    def observed_in(self, region: Region) -> Mapping[ir.Value, Observer]:
        """More observers of a region, as the walk's passes leave it; filled before the next region is rewritten.

        Asked for where a pass of the list observes ranges at all.
        """
        return {}

    def observed_anew(self, region: Region) -> Mapping[ir.Value, Observer]:
        """Observers of activations that came into a region after `observed` was asked, by a Mul before a linear, say.

        Asked for once a region, when the walk's passes are done with it.
        """
        return {}

    def on_copy(self, values: Mapping[str | None, ir.Value]) -> "Pass":
        """The pass for a copy of the model, with nothing decided; `values`: those of the copy, by name."""
        made = copy.copy(self)
        made.decisions = []
        return made

    @abstractmethod
    def call(self, region: Region) -> None:
        """Rewrite the region in place and append to `decisions`."""

    def decide(self, node: str, action: str, reason: str, *, format: str = "", **detail: Any) -> None:
        """Leave one decision behind."""
        self.decisions.append(Decision(node, action, reason, detail, format))


class WalksAgain(Pass):
    """A pass behind the walk that fits to what the graph as it is makes of the calibration data.

    It does so on a copy of the model first (`on_copy`), from a part of the data (`hold_aside`). Where the outputs on
    the others do not confirm it, it is refused, else it `walk_again`s with all data.
    """

    after_walk: ClassVar[bool] = True
    walks_again: ClassVar[bool] = True

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


def needs_calibration(made: Pass | type[Pass]) -> bool:
    """Whether a pass reads calibration data: for statistics, for ranges, or in a walk of its own.

    A kind of pass is taken with its default parameters.
    """
    kind = made if isinstance(made, type) else type(made)
    return made.needs_statistics or made.walks_again or kind.observed is not Pass.observed


def values_by_name(model: ir.Model) -> dict[str | None, ir.Value]:
    """What the nodes of the main graph read and give."""
    return {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}


def on_clone(late: Pass, model: ir.Model) -> tuple[Pass, ir.Model]:
    """A copy of a pass behind the walk, and a copy of the model that it is about to rewrite; weights are shared."""
    clone = model.clone()
    return late.on_copy(values_by_name(clone)), clone
