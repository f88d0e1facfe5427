"""Passes are held to what they declare (passes/contract.py): what each leaves is looked at before the next one runs.

Invariant: behind `run`, the region is a graph with the outputs that it had, and every fact that the pass ensures holds
of what it decided on; nothing that it computed depends on the number of BLAS's threads. The time is linear in the
region. What quantizing passes say of weights that are still floats is found by the census of the finished graph
(report/coverage.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.compiler.measure.phases import phase
from qcompile.passes.base import STATIC, Decision, Pass, Region
from qcompile.passes.contract import PENDING, Fact, Stage
from qcompile.passes.contrib.codes import codes_of
from qcompile.passes.errors import BrokenPromise
from qcompile.passes.formats.base import DOMAIN
from qcompile.passes.formats.functions import is_product
from qcompile.passes.linears import CONVOLUTIONS, Linear, find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.state import node_state, weight_state
from qcompile.passes.threads import ONE_BLAS_THREAD

# Kinds of nodes that are checked one by one where they became integer.
_PRODUCTS = ("MatMul", "Gemm", *CONVOLUTIONS)


def run(made: Pass, region: Region) -> None:
    """Call a pass on a region; BrokenPromise where it did not do what it says, or did what it does not say."""
    before, count = _Before.of(region), len(made.decisions)
    with phase(made.name, of_pass=True), ONE_BLAS_THREAD:
        made.call(region)
    nodes = list(region.model.graph) if made.stage != Stage.WALK else list(region.live_nodes())
    own = {str(node.name): node for node in nodes}
    found = [
        *before.lost(region),
        *_dangling(region.model, nodes),
        *(_disordered(nodes) if made.stage != Stage.WALK else ()),
        *(told for fact, told in _undeclared(before, nodes) if fact not in made.ensures),
    ]
    for fact in (own for own in Fact if own in made.ensures):
        found += _UNKEPT[fact](made, made.decisions[count:], own, region)
    if found:
        raise BrokenPromise(made.name, found[0])


@dataclass(frozen=True)
class _Before:
    """A region before a pass. outputs: names of the graph's outputs among what its nodes give, or of all of them."""

    nodes: Sequence[ir.Node]
    outputs: Sequence[str | None]
    marked: frozenset[tuple[str, Fact]]

    @classmethod
    def of(cls, region: Region) -> "_Before":
        nodes = list(region.nodes)
        given = [value.name for node in nodes for value in node.outputs if value.is_graph_output()]
        return cls(nodes, given, frozenset(_marked(nodes)))

    def lost(self, region: Region) -> Iterable[str]:
        """Outputs that the graph has no more, and nodes that are gone though others read them."""
        graph = region.model.graph
        there = {value.name for value in graph.outputs} if self.outputs else set()
        yield from (f"the graph has lost its output {name}" for name in self.outputs if name not in there)
        for node in self.nodes:
            for value in node.outputs if node.graph is not graph else ():
                reader = next((use.node for use in value.uses() if use.node.graph is graph), None)
                if reader is not None:
                    yield f"node {reader.name} reads {value.name} of a node that it removed"


def _marked(nodes: Iterable[ir.Node]) -> Iterable[tuple[str, Fact]]:
    """(linear, what waits there for a pass that stores its weight)."""
    return ((linear.name, fact) for linear in find_linears(nodes) for fact in PENDING if _has(linear, fact))


def _has(linear: Linear, fact: Fact) -> bool:
    weight = weight_state(linear.weight)
    if fact == Fact.CLIP:
        return weight.clip is not None
    if fact == Fact.GROUPS:
        return node_state(linear.node).grid is not None
    return linear.transposed in weight.codes if fact == Fact.CODES else node_state(linear.node).outliers is not None


def _undeclared(before: _Before, nodes: Iterable[ir.Node]) -> Iterable[tuple[Fact, str]]:
    """What was left for later passes: a list is checked by what its passes declare."""
    for name, fact in _marked(nodes):
        if (name, fact) not in before.marked:
            yield fact, f"it leaves {fact.value} at node {name} and does not ensure them"


def _dangling(model: ir.Model, nodes: Iterable[ir.Node]) -> Iterable[str]:
    graph = model.graph
    for node in nodes:
        for value in (given for given in node.inputs if given is not None):
            producer = value.producer()
            if producer is not None and producer.graph is not graph:
                yield f"node {node.name} reads {value.name}, which no node of the graph gives"
            if producer is None and not value.is_graph_input() and not value.is_initializer():
                yield f"node {node.name} reads {value.name}, which nothing gives"


def _disordered(nodes: Iterable[ir.Node]) -> Iterable[str]:
    place = {node: number for number, node in enumerate(nodes)}
    for node, number in place.items():
        for value in (given for given in node.inputs if given is not None):
            producer = value.producer()
            if producer is not None and place.get(producer, -1) > number:
                yield f"node {node.name} stands before {producer.name}, which it reads"


_Nodes = Mapping[str, ir.Node]


def _canonical(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    """That nodes stand in order is looked at behind every pass."""
    names = set[str]()
    for node in region.model.graph:
        if not node.name or node.name in names:
            yield f"two nodes have the name {node.name!r}"
        names.add(node.name or "")


def _pending(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    """Codes and outliers of every linear that is said to have them; clip of all that are to be quantized."""
    linears = {linear.name: linear for linear in find_linears(nodes.values())}
    for fact, action in ((Fact.CODES, "rounded"), (Fact.OUTLIERS, "marked")):
        for decision in decided if fact in made.ensures else ():
            linear = linears.get(decision.node)
            if decision.action == action and (linear is None or not _has(linear, fact)):
                yield f"node {decision.node} is said to be {action} and has no {fact.value}"
    policy: Policy | None = getattr(made, "policy", None)
    for linear in linears.values() if Fact.CLIP in made.ensures else ():
        wanted = policy is not None and not isinstance(policy.for_linear(linear, region.vocabulary), str)
        if wanted and not _has(linear, Fact.CLIP):
            yield f"it does not say of node {linear.name} whether its ranges may be clipped"


def _split(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    """Parts with grids of their own behind every sum that is said to be of such."""
    for decision in (own for own in decided if own.action == "split"):
        parts = list(_producers(nodes[decision.node])) if decision.node in nodes else []
        parts += [own for part in parts for own in _producers(part) if part.op_type == "Add"]
        if not any(node_state(part).grid is not None for part in parts):
            yield f"node {decision.node} is said to be split and has no {Fact.GROUPS.value}"


def _quantized(decided: Sequence[Decision], nodes: _Nodes) -> Iterable[tuple[Decision, ir.Node]]:
    """Decisions on products of the main graph that became codes, and their nodes."""
    for own in decided:
        product = own.detail.get("kind") in _PRODUCTS or own.format == STATIC
        if own.action == "quantized" and product and own.node in nodes:
            yield own, nodes[own.node]


def _packed(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    for decision, node in _quantized(decided, nodes):
        if not is_product(node):
            yield f"node {decision.node} is said to be packed and is a {node.op_type}"
        elif node_state(node).reference is None:
            yield f"node {decision.node} has no float weight to be checked against"


def _producers(node: ir.Node) -> Iterable[ir.Node]:
    """The nodes that give a node its inputs."""
    given = (value.producer() for value in node.inputs if value is not None)
    return (one for one in given if one is not None)


def _integer(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    for decision, node in _quantized(decided, nodes):
        decoded = any(node_state(one).decoded is not None for one in _producers(node))
        if node_state(node).twin is None and not decoded:
            yield f"node {decision.node} has no float form to be checked against"


def _static(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    for decision, node in _quantized(decided, nodes):
        behind = any(one.op_type == "DequantizeLinear" for one in _producers(node))
        if decision.format == STATIC and not behind and node.domain != DOMAIN:
            yield f"node {decision.node} is said to be on a fixed range, and no input of it is"


def _fused(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    for own in decided:
        if own.action == "fused" and (own.node not in nodes or nodes[own.node].op_type != own.reason):
            yield f"node {own.node} is said to be a {own.reason} and is none"


def _caches(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    for own in (decision for decision in decided if decision.action == "coded"):
        node = nodes.get(own.node)
        pasts = [value for value in node.inputs if value is not None and value.is_graph_input()] if node else []
        if not any(codes_of(value) is not None for value in pasts):
            yield f"node {own.node} is said to have coded caches, and has none"


def _nothing(made: Pass, decided: Sequence[Decision], nodes: _Nodes, region: Region) -> Iterable[str]:
    """Float weights, and the parts of attention, are what a file has."""
    return ()


# By fact, how it is not kept.
_UNKEPT = {
    Fact.CANONICAL: _canonical,
    Fact.FLOAT: _nothing,
    Fact.CLIP: _pending,
    Fact.CODES: _pending,
    Fact.OUTLIERS: _pending,
    Fact.GROUPS: _split,
    Fact.PACKED: _packed,
    Fact.INTEGER: _integer,
    Fact.STATIC: _static,
    Fact.PARTS: _nothing,
    Fact.FUSED: _fused,
    Fact.CACHES: _caches,
}
