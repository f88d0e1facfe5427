"""Pairs: an activation, the linears that read it, and the constants before it that can absorb a channel factor."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile.passes.absorb import Absorber, Trace, other_consumers, trace, weight_users
from qcompile.passes.affine import Array
from qcompile.passes.base import Decision, Region
from qcompile.passes.channel_map import Indices, last_axis
from qcompile.passes.linears import Linear, find_linears
from qcompile.passes.state import weight_state

Kind = Literal["norm", "gate", "attention", "linear", "inserted"]


@dataclass(frozen=True, eq=False)
class Shared:
    """Channels that share a factor have the same number; int64 (K,)."""

    channels: Indices

    def pool_max(self, x: Array) -> Array:
        """x (K,) with each entry replaced by the largest among the channels that share its factor."""
        pooled = np.full(int(self.channels.max()) + 1, -np.inf, np.float32)
        np.maximum.at(pooled, self.channels, x)
        return pooled[self.channels]

    def pool_mean(self, x: Array) -> Array:
        """x (K,) with each entry replaced by the mean over the channels that share its factor."""
        count = np.maximum(np.bincount(self.channels), 1)
        return (np.bincount(self.channels, weights=x) / count)[self.channels].astype(np.float32)


@dataclass(frozen=True, eq=False)
class Pair:
    """An activation `value` (…, K) whose channels can be rescaled without changing what the model computes.

    linears: those that read the value; their weight rows are multiplied by the factor.
    absorbers: the constants that are divided by it; none for kind "inserted", where an explicit Mul does it.
    channels: the producer's channel behind each channel of the value (K,). Channels that share one, as the heads of
    grouped-query attention do, share their factor.
    """

    value: ir.Value
    linears: tuple[Linear, ...]
    kind: Kind
    absorbers: tuple[Absorber, ...]
    channels: Indices

    @property
    def name(self) -> str:
        """The name of the value."""
        return self.value.name or ""

    @property
    def shared(self) -> "Shared":
        """Which channels share a factor."""
        return Shared(self.channels)


def find_pairs(region: Region, *, insert: bool = False) -> tuple[list[Pair], list[Decision]]:
    """All pairs of the region in graph order, and a decision with its reason for every activation left out.

    insert: activations without a producer that can absorb the factor become pairs of kind "inserted".
    """
    inside = {id(node) for node in region.live_nodes()}
    by_value: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(region.live_nodes()):
        by_value.setdefault(linear.activation, []).append(linear)
    pairs: list[Pair] = []
    skipped: list[Decision] = []
    for value, linears in by_value.items():
        pair = _pair(value, linears, inside)
        if insert and isinstance(pair, str) and not _foreign_weight(linears):
            k = linears[0].shape[0]
            pair = Pair(value, tuple(linears), "inserted", (), np.arange(k))
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            names = [linear.name for linear in linears]
            skipped.append(Decision(value.name or "", "skipped", pair, {"linears": names}))
    return pairs, skipped


def _pair(value: ir.Value, linears: list[Linear], inside: set[int]) -> Pair | str:
    reason = _foreign_weight(linears) or _foreign_consumer(value, linears)
    if reason:
        return reason
    found = trace(value)
    if isinstance(found, str):
        return found
    if any(id(node) not in inside for node in found.path):
        return "its producer lies outside the region"
    channels = last_axis(found.index, linears[0].shape[0])
    if isinstance(channels, str):
        return channels
    return found.conflict() or Pair(value, tuple(linears), _kind(found), found.absorbers, channels)


def _foreign_consumer(value: ir.Value, linears: list[Linear]) -> str:
    """Why rescaling the value would be seen by someone else, or an empty string."""
    if value.is_graph_output():
        return f"{value.name} is a graph output"
    known = {id(linear.node) for linear in linears}
    for node in other_consumers(value, linears[0].node, 0):
        if id(node) not in known:
            return f"{value.name} is also used by {node.op_type} {node.name}"
    return ""


def _foreign_weight(linears: list[Linear]) -> str:
    """Why scaling the rows of the weights would be seen by someone else, or an empty string."""
    known = {id(linear.node) for linear in linears}
    for linear in linears:
        if linear.weight.is_graph_output():
            return f"the weight {linear.weight.name} is a graph output"
        if weight_state(linear.weight).packed:
            return f"the weight {linear.weight.name} is packed already, for a node of an earlier segment"
        for node in weight_users(linear.weight):
            if node.op_type == "Gather":
                return "weight is tied to the embedding"
            if id(node) not in known:
                return f"the weight {linear.weight.name} is also used by {node.op_type} {node.name}"
    return ""


def _kind(found: Trace) -> Kind:
    root, rest = found.path[0], {node.op_type for node in found.path[1:]}
    if root.op_type != "MatMul":
        return "norm"
    if rest & {"MatMul", "Attention"}:
        return "attention"
    return "gate" if "Mul" in rest else "linear"
