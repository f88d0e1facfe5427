"""onnx's shape inference where it can do no harm: in a process of its own."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from functools import lru_cache

import onnx

from qcompile.passes.errors import UserError

# Processor seconds for a model, and more for so many nodes; one of 20,000 nodes takes one.
_SECONDS, _NODES_A_SECOND = 5, 2000
# Seconds on the clock for one of the processor, on a machine that is busy with others.
_PATIENCE = 10
# Seconds without an answer, each of which ends with the fork asleep, behind which it will not wake.
_ASLEEP = 3
# Bytes it may take beyond what this process has; propagating sizes as data takes 2^40 of them for forty Concats.
_MEMORY = 1 << 30
# Bytes of a model, its weights left out, up to which what was found is kept.
_SMALL = 1 << 20


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes that onnx can tell; an exception of any kind where it fails.

    onnx's C++ aborts the process on some graphs (a Slice backwards through an axis of no elements, in onnx 1.23), so
    the work is done by a fork of this process that computes, answers and ends. Where there is no fork, here. A fork may
    stand still on a lock that another thread held when it was made; then a process that is started anew does the work.
    Sizes that a graph computes are followed as data, unless that fails. UserError where it does not end (some Einsums,
    in onnx 1.23). What came of the last small models is known: a sweep, or a ladder, compiles one model many times.
    """
    if not hasattr(os, "fork"):
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    content = proto.SerializeToString()
    limit = _SECONDS + len(proto.graph.node) // _NODES_A_SECOND
    found = onnx.ModelProto()
    found.ParseFromString((_known if len(content) < _SMALL else _worked_out)(content, limit))
    return found


def _worked_out(content: bytes, limit: int) -> bytes:
    """The serialized model with its types and shapes; limit: processor seconds."""
    failed: Exception | None = None
    for follow in (True, False):
        try:
            return _answered(content, limit, follow=follow)
        except (RuntimeError, TimeoutError) as error:
            failed = error
    if isinstance(failed, TimeoutError):
        raise UserError(
            f"onnx's shape inference does not end on this model (stopped after {limit} s): look for a damaged node, "
            "such as an Einsum whose equation does not fit its inputs"
        )
    assert failed is not None
    raise failed


_known = lru_cache(maxsize=8)(_worked_out)


class _Blocked(Exception):
    """The fork waits for what nobody will give it."""


def _answered(content: bytes, limit: int, *, follow: bool) -> bytes:
    try:
        answer, used = _in_a_fork(content, limit, follow=follow)
    except _Blocked:
        answer, used = _in_a_process(content, limit, follow=follow)
    if answer is None or (not answer and used > limit - 1):
        raise TimeoutError(f"onnx took more than {limit} s")
    if answer[:1] != b"+":
        raise RuntimeError(answer[1:].decode("utf-8", "replace") or "onnx ended the process")
    return answer[1:]


def _in_a_fork(content: bytes, limit: int, *, follow: bool) -> tuple[bytes | None, float]:
    """(what `_answer` says, None where it takes too long, processor seconds)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(content, limit, writing, follow=follow)
    os.close(writing)
    try:
        answer = _whole(reading, child, time.monotonic() + _PATIENCE * limit)
    finally:
        os.close(reading)
        used = _ended(child)
    return answer, used


_ANEW = """
import sys
from qcompile.passes.prepare import inference
inference._answer(sys.stdin.buffer.read(), int(sys.argv[1]), 1, follow=sys.argv[2] == "True")
"""


def _in_a_process(content: bytes, limit: int, *, follow: bool) -> tuple[bytes | None, float]:
    """The same by an interpreter of its own, which takes a second to start."""
    command = [sys.executable, "-c", _ANEW, str(limit), str(follow)]
    try:
        done = subprocess.run(command, input=content, stdout=subprocess.PIPE, timeout=_PATIENCE * limit, check=False)
    except subprocess.TimeoutExpired:
        return None, 0.0
    return done.stdout, float(limit) if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else 0.0


def _ended(child: int) -> float:
    """Processor seconds of the fork, which is done, too late, or not needed any more: it cannot be left running."""
    os.kill(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return usage.ru_utime + usage.ru_stime


def _answer(content: bytes, limit: int, pipe: int, *, follow: bool) -> None:
    """In the fork: "+" and the model, or "-" and why not, into the pipe; nothing of Python's own end runs."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ says when it aborts
        _limit_seconds(limit)
        _limit_memory(_MEMORY + 20 * len(content))
        try:
            answer = b"+" + onnx.shape_inference.infer_shapes(content, data_prop=follow).SerializeToString()
        except BaseException as error:
            answer = b"-" + str(error).encode("utf-8", "replace")
        view = memoryview(answer)
        while view:
            view = view[os.write(pipe, view) :]
    finally:
        os._exit(0)


def _limit_seconds(limit: int) -> None:
    """Let the system end this process behind so many processor seconds, whatever becomes of the one that waits."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))


def _limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has; where the system does not know such a limit, any number."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(open("/proc/self/statm", "rb").read().split()[5])  # noqa: SIM115
        wanted = pages * resource.getpagesize() + more
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or soft > wanted:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _whole(pipe: int, child: int, end: float) -> bytes | None:
    """All that comes through the pipe; None where the time is over before."""
    parts: list[bytes] = []
    asleep = 0
    while time.monotonic() < end:
        if select.select([pipe], [], [], 1.0)[0]:
            part = os.read(pipe, 1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)
            asleep = 0
            continue
        asleep = asleep + 1 if _sleeps(child) else 0
        if asleep == _ASLEEP:
            raise _Blocked
    return None


def _sleeps(process: int) -> bool:
    """Whether it waits, rather than for a processor; False where the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"S"
    except OSError:
        return False
