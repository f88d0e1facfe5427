"""Locks between processes that write into one folder: held by an open file, so that the system frees those of the dead.

A process id says nothing in a container, where it is always 1, or on a folder that two machines share. Where a file
system or a platform knows no such locks, `exclusive` does not wait, and `is_free` takes every lock for held.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from qcompile.passes.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PATIENCE, _PAUSE = 60.0, 0.01  # seconds


@contextlib.contextmanager
def exclusive(path: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the lock file `path`, which is there only meanwhile; UserError where others hold it longer than `patience`.

    Whoever gets the lock of a file that has been removed since begins again: at most one holds the file of that name.
    """
    deadline = time.monotonic() + patience
    while (descriptor := _acquired(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"another process writes the same output (it holds {path}); try again, or write elsewhere")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: who waits finds that it has a file without a name
        os.close(descriptor)


@contextlib.contextmanager
def alive(path: Path) -> Iterator[bool]:
    """Make the file `path` and hold its lock: `is_free` of it is false until the end, or the end of the process.

    It waits for those who ask `is_free`. Gives whether it is held; false where there are no locks.
    """
    descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o600)
    try:
        yield _lock(descriptor, wait=True) is True
    finally:
        os.close(descriptor)


def is_free(path: Path) -> bool:
    """Whether the process that made the lock file is gone."""
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return _lock(descriptor) is True
    finally:
        os.close(descriptor)


def _acquired(path: Path) -> int | None:
    """The descriptor of the lock file, locked; None while another holds it."""
    descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
    try:
        if _lock(descriptor) is not False and _is(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """True with the lock, False where another has it and is not waited for, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
