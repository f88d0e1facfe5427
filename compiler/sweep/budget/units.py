"""What gets a format together: products of one input, which then stay one product, and whatever shares a weight."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.formats.half_scales import LEAST_HALVED
from qcompile.passes.linears import Embedding, Linear, find_embeddings, find_linears, vocabulary_size
from qcompile.passes.origins import source_of
from qcompile.passes.policy import Policy

Site = Linear | Embedding


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
    def names_of_weights(self) -> tuple[str, ...]:
        """Names of its weights."""
        values = (*(own.weight for own in self.linears), *(own.table for own in self.embeddings))
        return tuple(dict.fromkeys(str(own.name) for own in values))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(K, N) of every weight."""
        return list({_weight(own): _shape(own) for own in reversed(self.sites)}.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        """Linears, then lookups."""
        return (*self.linears, *self.embeddings)

    def grids(self, policy: Policy, vocabulary: int | None) -> list[Grid] | str:
        """What a policy gives each of its sites, by no number of theirs; the reason where one stays in float."""
        blank = replace(policy, blank=True)
        made = [blank.for_linear(own, vocabulary) for own in self.linears]
        made += [blank.for_embedding(own) for own in self.embeddings]
        refused = next((own for own in made if isinstance(own, str)), "")
        return refused or [own for own in made if not isinstance(own, str)]

    def stored(self, grids: Sequence[Grid]) -> list[tuple[tuple[int, int], Grid]]:
        """(K, N) and grid of all its weights as a file has them, with a grid for each site: once for all sites that
        read one weight on one grid the same way round.
        """
        found: dict[object, tuple[tuple[int, int], Grid]] = {}
        for own, grid in zip(self.sites, grids, strict=True):
            found[_weight(own), grid, isinstance(own, Embedding) or own.transposed] = _shape(own), grid
        return list(found.values())

    def elements(self, grids: Sequence[Grid]) -> int:
        """Weights of what is `stored`."""
        return sum(k * n for (k, n), _ in self.stored(grids))

    def bits(self, grids: Sequence[Grid], *, half_scales: bool = False) -> float:
        """Those of what is `stored`. half_scales: float32 scales become float16 where there are enough of them."""
        found = 0.0
        for (k, n), grid in self.stored(grids):
            halved = half_scales and grid.groups(k) * n >= LEAST_HALVED
            found += (grid.typed(np.float16) if halved else grid).bits_per_weight(k) * k * n
        return found

    @property
    def weights(self) -> int:
        """Elements of all of them."""
        return sum(k * n for k, n in self.shapes)


def find_units(model: ir.Model, policy: Policy, taken: Callable[[Site], bool] = lambda site: False) -> list[Unit]:
    """Of the main graph's linears and embeddings that the policy quantizes; but not those of which something else says
    the format (`taken`), nor any that reads the weight of such a one.
    """
    vocabulary = vocabulary_size(model)
    linears, tables = find_linears(model.graph), find_embeddings(model.graph)
    every: list[Site] = [*linears, *tables]
    gone = {_weight(own) for own in every if taken(own)}
    sites: list[Site] = [own for own in linears if not isinstance(policy.for_linear(own, vocabulary), str)]
    sites += [own for own in tables if not isinstance(policy.for_embedding(own), str)]
    sites = [own for own in sites if _weight(own) not in gone]
    keys = [{_weight(own), source_of(own.node, _weight(own))} for own in sites]
    keys = [key | {own.activation} if isinstance(own, Linear) else key for key, own in zip(keys, sites, strict=True)]
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


def _weight(site: Site) -> ir.Value:
    return site.weight if isinstance(site, Linear) else site.table


def _shape(site: Site) -> tuple[int, int]:
    """(K, N) of the product; a table (V, K) is the transpose of one."""
    return site.shape if isinstance(site, Linear) else (site.shape[1], site.shape[0])


def _unit(sites: Sequence[Site]) -> Unit:
    linears = tuple(own for own in sites if isinstance(own, Linear))
    return Unit(linears, tuple(own for own in sites if isinstance(own, Embedding)))
