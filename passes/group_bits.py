"""Bits by group of input rows, by what its errors do to the output, at the same mean (SliM-LLM, Huang et al. 2024)."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.absorb import weight_users
from qcompile.passes.affine import Array, Grid
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.formats import named
from qcompile.passes.formats.base import become, drop_weight
from qcompile.passes.graph import Names, add_initializer, insert_before
from qcompile.passes.held import NOT_CONFIRMED, too_few
from qcompile.passes.linears import Linear
from qcompile.passes.policy import Policy
from qcompile.passes.spec import QuantSpec
from qcompile.passes.state import node_state, set_node, set_weight, weight_state
from qcompile.passes.statistics import Numbers, Statistics

# Bits that have a format with one bit less and one with one more.
_BITS = (3, 4, 5)
# Columns of all the weights of an input that tell what its groups' errors are.
_SAMPLES = 256


@dataclass(frozen=True, eq=False)
class Choice:
    """Groups that have a bit less, and as many that have one more, ascending. left: the share of the error then."""

    low: Numbers
    high: Numbers
    left: float


class GroupBits(Pass):
    """Give a bit more to groups of input rows whose errors weigh most, and one less to as many (SliM-LLM).

    A group is as many rows as share a scale. x W becomes x[low] W[low] + x[rest] W[rest] + x[high] W[high], exactly,
    and the passes behind round and store each part as a weight of its own: the mean of bits is that of the format.
    Case 1: an input whose products all have an integer format of 3, 4 or 5 bits, and no weight that others read: its
            groups are chosen for all of them, so that its channels are gathered once.
    Case 2: as many groups as take most off the squared error, by the mean square of channels and the errors of
            rounding; none where less than `threshold` goes, or where rows held aside do not confirm that.
    threshold: the share of the squared error that is worth up to three products instead of one.
    """

    name: ClassVar[str] = "group_bits"
    decided: ClassVar[str] = "which products group_bits splits"
    reads: Set[Reads] = frozenset({Reads.STATISTICS})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.GROUPS})

    def __init__(self, policy: Policy, *, threshold: float = 0.1) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise UserError(f"group_bits: threshold must lie between 0 and 1, got {threshold}")
        self.policy, self.threshold = policy, threshold

    def call(self, region: Region) -> None:
        """Split the region's products; each linear has a decision."""
        inputs = self.quantized_inputs(region, self.policy)
        for value, linears in inputs.items():
            found = self._refused(region, value, linears) or self._chosen(region.statistics[value], linears)
            if isinstance(found, str):
                for linear in linears:
                    self.decide(linear.name, "skipped", found)
                continue
            spec = next(iter(linears.values()))
            assert isinstance(spec, QuantSpec)
            self._split(region, value, list(linears), spec, found)

    def _refused(self, region: Region, value: ir.Value, linears: Mapping[Linear, Grid]) -> str:
        """Case 1: why the products of an input stay whole, or an empty string."""
        first, spec = next(iter(linears.items()))
        k, statistics = first.shape[0], region.statistics.get(value)
        if statistics is None:
            return "its input was not observed"
        if statistics.rotation is not None:
            return "its input is turned already: list group_bits before rotate"
        if any(own != spec for own in linears.values()):
            return "products of its input have several formats"
        if not isinstance(spec, QuantSpec) or spec.bits not in _BITS:
            return f"{spec.format} has no format of one bit less and of one more beside it: int3, int4 and int5 have"
        if spec.group_size(k) >= k:
            return "all of its rows share a scale"
        if any(len(weight_users(linear.weight)) > 1 or linear.weight.is_graph_output() for linear in linears):
            return "another node reads its weight, too"
        if any(weight_state(linear.weight).codes for linear in linears):
            return "its codes are chosen already: list group_bits before what chooses them"
        if any(node_state(linear.node).outliers is not None for linear in linears):
            return "channels of its input stay in float already: list group_bits before what marks them"
        beside = (named(f"int{spec.bits + more}") for more in (-1, 1))
        return next((told for own in beside if (told := own.refusal(self.policy.target, spec, k))), "")

    def _chosen(self, statistics: Statistics, linears: Mapping[Linear, Grid]) -> Choice | str:
        """Case 2."""
        if reason := too_few(statistics):
            return reason
        errors = np.sum([_errors(linear, spec, statistics, len(linears)) for linear, spec in linears.items()], axis=0)
        size = next(iter(linears.values())).group_size(len(statistics.absmax))
        choice = choose(_by_group(errors, statistics.energy, size))
        parts = statistics.split()
        if not len(choice.low) or choice.left > 1 - self.threshold:
            return "no groups are worth products of their own"
        if parts is not None:
            rest, held = parts
            trial = choose(_by_group(errors, rest.energy, size))
            if left_of(_by_group(errors, np.square(held).mean(axis=0), size), trial) > 1 - self.threshold:
                return NOT_CONFIRMED
        return choice

    def _split(
        self, region: Region, value: ir.Value, linears: Sequence[Linear], spec: QuantSpec, choice: Choice
    ) -> None:
        k, names, model = linears[0].shape[0], Names(region.model), region.model
        rows = np.arange(k) // spec.group_size(k)
        more = np.isin(rows, choice.high).astype(int) - np.isin(rows, choice.low)
        specs = {replace(spec, bits=spec.bits + step): np.flatnonzero(more == step) for step in (-1, 0, 1)}
        parts = {own: channels for own, channels in specs.items() if len(channels)}
        place, taken = region.nodes.index(linears[0].node), dict[QuantSpec, ir.Value]()
        made: list[ir.Node] = []
        for own, channels in parts.items():
            name = names.fresh(f"{value.name}.{own.format}")
            index = add_initializer(model.graph, f"{name}.channels", ir.tensor(channels.astype(np.int64)))
            taken[own] = insert_before(linears[0].node, "Gather", [value, index], {"axis": -1}, name=name, output=name)
            taken[own].type = value.type
            taken[own].shape = ir.Shape([*value.shape[:-1], len(channels)]) if value.shape is not None else None
            region.statistics[taken[own]] = region.statistics[value].part(channels)
            made.append(_producer(taken[own]))
        region.nodes[place:place] = made
        groups = -(-k // spec.group_size(k))
        told = f"{len(choice.high)} of {groups} groups with a bit more, as many with one less"
        for linear in linears:
            self._split_linear(region, linear, taken, parts, names)
            self.decide(linear.name, "split", told, relative_loss=choice.left)
        if not value.uses() or all(use.node in made for use in value.uses()):
            region.statistics.pop(value)  # of no more use, and may be large

    def _split_linear(
        self,
        region: Region,
        linear: Linear,
        taken: Mapping[QuantSpec, ir.Value],
        parts: Mapping[QuantSpec, Numbers],
        names: Names,
    ) -> None:
        """Products of the parts before the node, which becomes their sum."""
        node, graph, w, read = linear.node, region.model.graph, linear.mapped(), linear.node.inputs[1]
        made, given = list[ir.Node](), list[ir.Value]()

        def before(operator: str, inputs: list[ir.Value], name: str) -> ir.Value:
            value = insert_before(node, operator, inputs, name=name, output=name)
            value.type, value.shape = linear.activation.type, node.outputs[0].shape
            made.append(_producer(value))
            return value

        for spec, channels in parts.items():
            name = names.fresh(f"{linear.weight.name}.{spec.format}.part")
            weight = add_initializer(graph, name, ir.tensor(np.ascontiguousarray(w[channels]), name=name))
            set_weight(weight, clip=weight_state(linear.weight).clip)
            given.append(before("MatMul", [taken[spec], weight], names.fresh(f"{linear.name}.{spec.format}")))
            set_node(made[-1], grid=spec)
        total = given[0] if len(given) == 2 else before("Add", given[:2], names.fresh(f"{linear.name}.both"))
        place = region.nodes.index(node)
        region.nodes[place:place] = made
        become(node, "Add", [total, given[-1]], {}, domain="")
        drop_weight(region.model, linear.weight, read)


def choose(errors: Array) -> Choice:
    """As many groups to lose a bit as gain one, of errors (3, G) with a bit less, the format's own, and one more."""
    less, own, more = errors
    order = np.argsort(own, kind="stable")
    most = len(own) // 2
    change = np.cumsum((less - own)[order[:most]]) - np.cumsum((own - more)[order[::-1][:most]])
    count = int(np.argmin(change)) + 1 if most and change.min() < 0 else 0
    low, high = np.sort(order[:count]), np.sort(order[len(order) - count :])
    return Choice(low, high, float(left_of(errors, Choice(low, high, 1.0))))


def left_of(errors: Array, choice: Choice) -> float:
    """The errors (3, G) of a choice relative to those of none."""
    less, own, more = errors
    whole = float(own.sum())
    change = (less - own)[choice.low].sum() - (own - more)[choice.high].sum()
    return 1 + float(change) / whole if whole > 0 else 1.0


def _errors(linear: Linear, spec: Grid, statistics: Statistics, count: int) -> Array:
    """(3, K): squared errors of the rows of some columns, rounded with a bit less, as many, and one more, relative to
    what all of them give.
    """
    assert isinstance(spec, QuantSpec)
    step, energy = max(1, linear.shape[1] * count // _SAMPLES), statistics.energy
    w = np.ascontiguousarray(linear.read()[:, ::step])
    power = float(energy @ np.square(w).sum(axis=1)) or 1.0
    found = []
    for more in (-1, 0, 1):
        own = replace(spec, bits=spec.bits + more)
        qparams = own.fit(w, energy)
        found.append(np.square(own.decode(own.project(w, qparams), qparams) - w).sum(axis=1) / power)
    return np.stack(found)


def _by_group(errors: Array, energy: Array, size: int) -> Array:
    """(3, G) of errors of rows (3, K) and the mean squares of channels (K,); of whole groups."""
    groups = errors.shape[1] // size
    return np.asarray((errors * energy)[:, : groups * size].reshape(3, groups, size).sum(axis=2))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
