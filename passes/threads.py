"""How many threads work side by side: as many as there are cores, unless the user says how many.

Work is cut the same way whatever their number, each piece is computed with one thread of BLAS, and results are joined
in the order of the work, so that no number that passes compute depends on it. (What ONNX Runtime's sessions sum may.)
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Generic, TypeVar

from threadpoolctl import ThreadpoolController

_LIMIT: ContextVar[int | None] = ContextVar("threads", default=None)
_HELPERS: ContextVar[Executor | None] = ContextVar("helpers", default=None)
T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def limited(most: int | None) -> Iterator[None]:
    """Inside, at most so many threads in each pool and session; None leaves it to them."""
    token = _LIMIT.set(most)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limit() -> int | None:
    """What `limited` says."""
    return _LIMIT.get()


def workers() -> int:
    """Threads that work side by side: `limit`, or one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _LIMIT.get() or cores


@functools.cache
def _pools() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded, numpy's among them: to look for them takes a millisecond."""
    return ThreadpoolController()


class _OneBlasThread(threading.local):
    """Inside, BLAS computes a product in the thread that asks for it: several would cut its sums by their number, and
    wait for each other where all are at work anyway. What BLAS was told before holds again behind it.

    Within a block another one of the same thread is free. Where the number is the process's (OpenBLAS with threads of
    its own), that of the thread that came first holds for all, until it goes.
    """

    _inside: int = 0
    _limits: Any = None

    def __enter__(self) -> None:
        if not self._inside:
            self._limits = _pools().limit(limits=1, user_api="blas")
        self._inside += 1

    def __exit__(self, *failure: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._limits.__exit__(*failure)


ONE_BLAS_THREAD = _OneBlasThread()


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """function(item) of each item, in order; called by `workers` threads, this one among them, with `ONE_BLAS_THREAD`.

    Inside, it may be called again: whoever has nothing else to do helps there, and nobody waits for a free thread.
    """
    work = _Work(function, list(items))
    with ONE_BLAS_THREAD:
        _done(work)
    return [work.results[number] for number in range(len(work.items))]


def _done(work: "_Work[T, R]") -> None:
    helpers, more = _HELPERS.get(), min(workers(), len(work.items)) - 1
    if more < 1:
        work.help()
    elif helpers is not None:
        work.shared(helpers, more)
    else:
        # Where each thread has a number of its own (OpenMP), helpers need theirs as well.
        with ThreadPoolExecutor(workers() - 1, initializer=ONE_BLAS_THREAD.__enter__) as pool:
            token = _HELPERS.set(pool)
            try:
                work.shared(pool, more)
            finally:
                _HELPERS.reset(token)


class _Work(Generic[T, R]):
    """Items that several threads take one after another."""

    def __init__(self, function: Callable[[T], R], items: Sequence[T]) -> None:
        self.function, self.items = function, items
        self.results: dict[int, R] = {}
        self._numbers = itertools.count()
        self._stopped = False

    def help(self) -> None:
        """Take items while there are any; of those that fail, nobody takes another one."""
        try:
            while not self._stopped and (number := next(self._numbers)) < len(self.items):
                self.results[number] = self.function(self.items[number])
        except BaseException:
            self._stopped = True
            raise

    def shared(self, helpers: Executor, more: int) -> None:
        """The same with the help of so many others, where they come before all is taken."""
        promised = [helpers.submit(copy_context().run, self.help) for _ in range(more)]
        try:
            self.help()
        finally:
            begun = [helper for helper in promised if not helper.cancel()]
            failures = [failure for helper in begun if (failure := helper.exception()) is not None]
        if failures:
            raise failures[0]
