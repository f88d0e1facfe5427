"""Which of its options each unit gets, so that all costs together are least and all sizes within a sum.

Costs add up, so the choices are independent but for the sum: each unit's options of the lower convex hull, and of all
steps along the hulls first those that gain most for a byte (Everett 1963; Shoham and Gersho 1988). Sums between two
steps are filled by what still fits, and then unit by unit, by sums that may still be better (Nemhauser and Ullmann
1969), within bounds that the hulls of the units to come give (Dyer, Riha and Walker 1995).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)
# What sums of costs are off by, relative, when their terms are added in another order.
_ROUNDED = 1e-9
# The share of the least cost that a choice may be above it, and the most sums that are looked at behind a unit.
_CLOSE, _MOST = 1e-3, 1024


@dataclass(frozen=True)
class Option(Generic[T]):
    """What a unit may become. cost: what it changes, in any unit that adds up. size: bytes."""

    what: T
    size: float
    cost: float

    @property
    def turned(self) -> "Option[T]":
        """With its cost for its size, and its size for its cost."""
        return Option(self.what, self.cost, self.size)


@dataclass(frozen=True)
class _Step:
    """From an option of a unit to the next one of its hull."""

    unit: int
    to: int
    size: float
    gain: float


def allocate(units: Sequence[Sequence[Option[T]]], size: float) -> list[Option[T]] | None:
    """The choice of least cost within a size, to `_CLOSE` of that as far as `_MOST` sums tell; None where the smallest
    options are too large together.
    """
    hulls = [hull(options) for options in units]
    chosen, left = [0] * len(hulls), size - sum(own[0].size for own in hulls)
    if left < 0:
        return None
    stuck = set[int]()
    for step in _steps(hulls):
        if step.unit not in stuck and step.size <= left:
            chosen[step.unit], left = step.to, left - step.size
        else:
            stuck.add(step.unit)  # its further steps gain less for a byte yet
    made = [own[at] for own, at in zip(hulls, chosen, strict=True)]
    return _better(units, size, (1 - _CLOSE) * sum(own.cost for own in made)) or made


def frontier(units: Sequence[Sequence[Option[T]]]) -> list[list[Option[T]]]:
    """The choices that are best within their own sizes, from the smallest options to the largest of the hulls, one step
    of one unit from each to the next: the lower convex hull of (sum of sizes, sum of costs) over all choices.
    """
    hulls = [hull(options) for options in units]
    made = [[own[0] for own in hulls]]
    for step in _steps(hulls):
        made.append([*made[-1]])
        made[-1][step.unit] = hulls[step.unit][step.to]
    return made


def keeping(units: Sequence[Sequence[Option[T]]], cost: float) -> list[Option[T]]:
    """The choice of least size whose costs are no more together, as near to that as `allocate`'s; the last one of the
    `frontier`, where none is.
    """
    made = allocate([[own.turned for own in options] for options in units], cost * (1 + _ROUNDED))
    return [hull(options)[-1] for options in units] if made is None else [own.turned for own in made]


def bytes_of(made: Sequence[Option[T]]) -> float:
    """All sizes of a choice together."""
    return sum(own.size for own in made)


def hull(options: Sequence[Option[T]]) -> list[Option[T]]:
    """The options from the smallest on that are on the lower convex hull of (size, cost): each is larger than the one
    before it, and costs less.
    """
    found: list[Option[T]] = []
    for own in sorted(options, key=lambda option: (option.size, option.cost)):
        if found and own.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-1], own):
            found.pop()
        found.append(own)
    return found


def _better(units: Sequence[Sequence[Option[T]]], size: float, goal: float) -> list[Option[T]] | None:
    """The choice of least cost within a size, where that is no more than `goal`; None where none is, or none is met.

    Behind each unit, of all sums (size, cost) up to it those that no other is below in both, and with which the hulls
    of the units to come may still reach the goal.
    """
    sums, before = np.zeros((1, 2)), list[tuple[list[Option[T]], np.ndarray, np.ndarray]]()
    bounds = _bounds(units)
    if np.interp(size, *next(bounds)) > goal:
        return None
    for options, (sizes, costs) in zip(units, bounds, strict=True):
        added = (sums[:, None] + np.array([(own.size, own.cost) for own in options])).reshape(-1, 2)
        least = added[:, 1] + np.interp(size - added[:, 0], sizes, costs)
        kept = np.flatnonzero((added[:, 0] + sizes[0] <= size) & (least <= goal))
        kept = kept[np.argsort(least[kept], kind="stable")[:_MOST]]
        kept = kept[np.lexsort((added[kept, 1], added[kept, 0]))]
        lowest = np.minimum.accumulate(np.append(np.inf, added[kept, 1]))
        kept = kept[added[kept, 1] < lowest[:-1]]
        if not len(kept):
            return None
        sums = added[kept]
        before.append((list(options), *np.divmod(kept, len(options))))
    at, made = len(sums) - 1, list[Option[T]]()
    for options, came, chosen in reversed(before):
        made.append(options[chosen[at]])
        at = came[at]
    return made[::-1]


def _bounds(units: Sequence[Sequence[Option[T]]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Before the first unit, and behind each: (sizes, least costs) of all to come, between which costs are at least
    what lies between.
    """
    hulls = [hull(options) for options in units]
    steps = [(step.unit, step.size, -step.gain) for step in _steps(hulls)]
    moved = np.array(steps).reshape(-1, 3)
    first = np.array([(own[0].size, own[0].cost) for own in hulls]).reshape(-1, 2)
    for number in range(len(hulls) + 1):
        whole = np.vstack([first[number:].sum(0), moved[moved[:, 0] >= number, 1:]]).cumsum(0)
        yield whole[:, 0], whole[:, 1]


def _slope(a: Option[T], b: Option[T]) -> float:
    """What is gained for a byte."""
    return (a.cost - b.cost) / (b.size - a.size)


def _steps(hulls: Sequence[Sequence[Option[T]]]) -> list[_Step]:
    """Those of all units, the ones that gain most for a byte first; of one unit in order."""
    steps = [
        _Step(unit, to, own[to].size - own[to - 1].size, own[to - 1].cost - own[to].cost)
        for unit, own in enumerate(hulls)
        for to in range(1, len(own))
    ]
    return sorted(steps, key=lambda step: (-step.gain / step.size, step.unit, step.to))
