"""onnx's shape inference where it can do no harm: in a process of its own."""

import contextlib
import os
import select
import signal
import time

import onnx

# Seconds for a whole model; one of 20,000 nodes takes one.
_LIMIT = 120.0
# Bytes it may take beyond what this process has; propagating sizes as data takes 2^40 of them for forty Concats.
_MEMORY = 1 << 30


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes that onnx can tell; an exception of any kind where it fails.

    onnx's C++ aborts the process on some graphs (a Slice backwards through an axis of no elements, in onnx 1.23), so
    the work is done by a fork of this process that computes, answers and ends. Where there is no fork, here.
    Sizes that a graph computes are followed as data, unless that fails.
    """
    if not hasattr(os, "fork"):
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    content = proto.SerializeToString()
    try:
        return _in_a_fork(content, follow=True)
    except (RuntimeError, TimeoutError):
        return _in_a_fork(content, follow=False)


def _in_a_fork(content: bytes, *, follow: bool) -> onnx.ModelProto:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(content, writing, follow=follow)
    os.close(writing)
    try:
        answer = _whole(reading, time.monotonic() + _LIMIT)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # done, too late, or not needed any more: it cannot be left running
        os.waitpid(child, 0)
    if answer is None:
        raise TimeoutError(f"onnx took more than {_LIMIT:.0f} s")
    if answer[:1] != b"+":
        raise RuntimeError(answer[1:].decode("utf-8", "replace") or "onnx ended the process")
    found = onnx.ModelProto()
    found.ParseFromString(answer[1:])
    return found


def _answer(content: bytes, pipe: int, *, follow: bool) -> None:
    """In the fork: "+" and the model, or "-" and why not, into the pipe; nothing of Python's own end runs."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ says when it aborts
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


def _limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has; where the system does not know such a limit, any number."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(open("/proc/self/statm", "rb").read().split()[5])  # noqa: SIM115
        wanted = pages * resource.getpagesize() + more
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or soft > wanted:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _whole(pipe: int, end: float) -> bytes | None:
    """All that comes through the pipe; None where the time is over before."""
    parts: list[bytes] = []
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
