"""Which of its options each unit gets, so that all costs together are least and all sizes within a sum.

Costs add up, so the choices are independent but for the sum: each unit's options of the lower convex hull, and of all
steps along the hulls first those that gain most for a byte (Everett 1963; Shoham and Gersho 1988). Sums between two
steps are filled by what still fits.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
# What sums of costs are off by, relative, when their terms are added in another order.
_ROUNDED = 1e-9


@dataclass(frozen=True)
class Option(Generic[T]):
    """What a unit may become. cost: what it changes, in any unit that adds up. size: bytes."""

    what: T
    size: float
    cost: float


@dataclass(frozen=True)
class _Step:
    """From an option of a unit to the next one of its hull."""

    unit: int
    to: int
    size: float
    gain: float


def allocate(units: Sequence[Sequence[Option[T]]], size: float) -> list[Option[T]] | None:
    """The choice of least cost that the hulls have within a size, and what still fits on top; None where the smallest
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
    return [own[at] for own, at in zip(hulls, chosen, strict=True)]


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
    """The first choice of the `frontier` whose costs are no more together; the last one, where none is."""
    hulls = [hull(options) for options in units]
    chosen, whole = [0] * len(hulls), sum(own[0].cost for own in hulls)
    for step in _steps(hulls):
        if whole <= cost * (1 + _ROUNDED):
            break
        chosen[step.unit], whole = step.to, whole - step.gain
    return [own[at] for own, at in zip(hulls, chosen, strict=True)]


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
