"""Who computes what does not depend on each other: threads of this process, or whoever `working` names.

Invariant: results are those of one item after the other, whoever computes them, in whatever order they are done. So a
computation gets plain values (arrays, statistics, grids; no node of a graph), changes none of them, and returns plain
values; what is done with its result is done here.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from qcompile.passes.threads import allowed

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


class Threads:
    """So many threads of this process; one is this very thread."""

    def __init__(self, most: int) -> None:
        self.most = most

    def each(
        self,
        compute: Callable[..., R],
        items: Sequence[T],
        *,
        load: Callable[[T], tuple[Any, ...]],
        given: tuple[Any, ...] = (),
    ) -> Iterator[tuple[int, R]]:
        """As `Workers`; what is loaded belongs to the thread that computes with it."""

        def one(item: T) -> R:
            return compute(*given, *load(item))

        if self.most < 2 or len(items) < 2:
            yield from ((number, one(item)) for number, item in enumerate(items))
            return
        with ThreadPoolExecutor(self.most) as pool:
            numbers = {pool.submit(one, item): number for number, item in enumerate(items)}
            yield from ((numbers[done], done.result()) for done in as_completed(numbers))


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
    threads: int,
) -> list[R]:
    """compute(*given, *load(item)) of every item, in order; by so many threads at most where this process computes."""
    workers = elsewhere() or Threads(allowed(threads))
    return list(in_order(workers.each(compute, items, load=load, given=given)))
