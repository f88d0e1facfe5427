"""How many threads may work side by side: as many as there are cores, unless the user says how many."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LIMIT: ContextVar[int | None] = ContextVar("threads", default=None)


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


def allowed(wanted: int) -> int:
    """Threads of a pool that would have `wanted`."""
    most = _LIMIT.get()
    return wanted if most is None else min(wanted, most)
