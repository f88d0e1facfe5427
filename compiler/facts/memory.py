"""How much memory is left, where the system tells, and what would not fit into it."""

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import psutil

from qcompile.passes.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_LEAST = 2 << 30


def available() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where nobody tells."""
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def swappable() -> int:
    """Bytes that can be had beyond `available` by swapping; 0 in a container with a limit, and where nobody tells."""
    try:
        return int(psutil.swap_memory().free) if _container() is None else 0
    except (OSError, RuntimeError, psutil.Error):
        return 0


def resident() -> int:
    """Bytes of this process that are in memory; 0 where nobody tells."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        return 0


def give_back() -> None:
    """Have the system take back what was freed: glibc keeps pieces of up to 32 MB, each thread's for itself, and what
    comes next is of other sizes and does not fit into them. Other allocators do that by themselves.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library is another."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return found
    except (AttributeError, OSError, TypeError):  # musl and macOS; Windows
        return None


def check_sizes(model: ir.Model) -> None:
    """Raise UserError for a value of known shape that takes more memory than there is: an input, or what a node gives.

    A few bytes can ask for any number of them: ConstantOfShape, Expand, Tile, Range, a Concat of a value with itself.
    """
    free = available()
    if free is None:
        return
    for value in (*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)):
        size = _bytes(value)
        if size > free:
            node = value.producer()
            kind = "input" if node is None else f"node {node.op_type} {node.name!r}:"
            sizes = [int(dim) for dim in value.shape or () if isinstance(dim, int)]
            raise UserError(
                f"{kind} {value.name!r} {sizes} takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
            ) from MemoryError()


def _bytes(value: ir.Value) -> float:
    """What the value takes, as far as it is known."""
    if value.shape is None or value.dtype is None or value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return 0
    if not all(isinstance(size, int) for size in value.shape):
        return 0
    return math.prod(size for size in value.shape if isinstance(size, int)) * value.dtype.bitwidth / 8


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Have allocations fail, in native code too, that ask for more than memory and swap hold; where Linux tells.

    Otherwise the system grants them and ends the process, or another one, when they are used.
    """
    free = available()
    free = None if free is None else free + swappable()
    try:
        import resource

        held = int(psutil.Process().memory_info().data)  # Linux tells it
        before = resource.getrlimit(resource.RLIMIT_DATA)
    except (ImportError, AttributeError, OSError, psutil.Error):
        free = None
    if free is None:
        yield
        return
    # Threads and what is reserved without being used count, too: never so little that nothing starts.
    wanted = held + max(free, _LEAST)
    if before[0] == resource.RLIM_INFINITY or before[0] > wanted:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _system() -> int | None:
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, RuntimeError, psutil.Error):
        return None


def _container() -> int | None:
    """What is left below memory.max of cgroup v2, file pages not counted; None without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - int(used) + int(stat.get("file", 0))
