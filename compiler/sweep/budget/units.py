"""What gets a format together: products of one input, which then stay one product, and whatever shares a weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.linears import Embedding, Linear, find_embeddings, find_linears, vocabulary_size
from qcompile.passes.policy import Policy


@dataclass(frozen=True, eq=False)
class Unit:
    """Linears and lookups, in the order of the graph, each weight stored once however many nodes read it."""

    linears: tuple[Linear, ...]
    embeddings: tuple[Embedding, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of its nodes."""
        return (*(own.name for own in self.linears), *(own.name for own in self.embeddings))

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of its weights."""
        values = (*(own.weight for own in self.linears), *(own.table for own in self.embeddings))
        return tuple(dict.fromkeys(str(own.name) for own in values))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(K, N) of every weight."""
        found = {own.weight: own.shape for own in self.linears}
        return list(({own.table: own.shape[::-1] for own in self.embeddings} | found).values())

    @property
    def weights(self) -> int:
        """Elements of all of them."""
        return sum(k * n for k, n in self.shapes)


def find_units(model: ir.Model, policy: Policy) -> list[Unit]:
    """Of the main graph's linears and embeddings that the policy quantizes."""
    vocabulary = vocabulary_size(model)
    linears = [own for own in find_linears(model.graph) if not isinstance(policy.for_linear(own, vocabulary), str)]
    tables = [own for own in find_embeddings(model.graph) if not isinstance(policy.for_embedding(own), str)]
    keys = [{own.activation, own.weight} for own in linears] + [{own.table} for own in tables]
    sites: list[Linear | Embedding] = [*linears, *tables]
    return [_unit([sites[i] for i in group]) for group in joined(keys)]


def joined(keys: Sequence[Iterable[object]]) -> list[list[int]]:
    """Positions of sets of keys in groups that share a key, directly or by others."""
    group: dict[object, int] = {}
    members: dict[int, list[int]] = {}
    for position, own in enumerate(keys):
        met = sorted({group[key] for key in own if key in group})
        first = met[0] if met else position
        members.setdefault(first, []).append(position)
        for other in met[1:]:
            members[first] += members.pop(other)
        group.update((key, first) for place in members[first] for key in keys[place])
    return [sorted(own) for own in members.values()]


def _unit(sites: Sequence[Linear | Embedding]) -> Unit:
    linears = tuple(own for own in sites if isinstance(own, Linear))
    return Unit(linears, tuple(own for own in sites if isinstance(own, Embedding)))
