"""Who computes what does not depend on each other: threads of this process, or whoever `working` names.

Invariant: results are those of one item after the other, whoever computes them, in whatever order they are done. So a
computation gets plain values (arrays, statistics, grids; no node of a graph), changes none of them (but for what they
keep to be found again: `Statistics.split`), and returns plain values; what is done with its result is done here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from qcompile.passes.threads import side_by_side

T = TypeVar("T")
R = TypeVar("R")


class Workers(Protocol):
    """Computes many items side by side."""

    def each(
        self,
        compute: Callable[..., R],
        items: Sequence[T],
        *,
        load: Callable[[T], tuple[Any, ...]],
        given: tuple[Any, ...] = (),
    ) -> Iterator[tuple[int, R]]:
        """(number of the item, compute(*given, *load(item))), as they are done.

        load: runs in this process, shortly before the item is computed, so that what it reads is not all in memory at
        once. compute, given and what `load` gives can be pickled.
        """


class Here:
    """This thread, one item after the other."""

    def each(
        self,
        compute: Callable[..., R],
        items: Sequence[T],
        *,
        load: Callable[[T], tuple[Any, ...]],
        given: tuple[Any, ...] = (),
    ) -> Iterator[tuple[int, R]]:
        """As `Workers`."""
        yield from ((number, compute(*given, *load(item))) for number, item in enumerate(items))


def in_order(found: Iterator[tuple[int, R]]) -> Iterator[R]:
    """Results by their numbers, 0 first; those that come early are held back."""
    early, wanted = dict[int, R](), 0
    for number, result in found:
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


_WORKERS: ContextVar[Workers | None] = ContextVar("workers", default=None)


@contextmanager
def working(workers: Workers | None) -> Iterator[None]:
    """Inside, these compute; None leaves it to this process."""
    token = _WORKERS.set(workers)
    try:
        yield
    finally:
        _WORKERS.reset(token)


def elsewhere() -> Workers | None:
    """Who computes instead of this process, if anybody does."""
    return _WORKERS.get()


def mapped(
    compute: Callable[..., R],
    items: Sequence[T],
    *,
    load: Callable[[T], tuple[Any, ...]],
    given: tuple[Any, ...] = (),
) -> list[R]:
    """compute(*given, *load(item)) of every item, in order; side by side in threads where this process computes, as it
    does with one item alone.
    """
    workers = elsewhere()
    if workers is None or len(items) < 2:
        return side_by_side(lambda item: compute(*given, *load(item)), items)
    return list(in_order(workers.each(compute, items, load=load, given=given)))
