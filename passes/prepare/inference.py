"""onnx's shape inference where it can do no harm: in a process of its own."""

import os
import select
import signal
import time

import onnx

# Seconds for a whole model; one of 20,000 nodes takes one.
_LIMIT = 120.0


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes that onnx can tell; an exception of any kind where it fails.

    onnx's C++ aborts the process on some graphs (a Slice backwards through an axis of no elements, in onnx 1.23), so
    the work is done by a fork of this process that computes, answers and ends. Where there is no fork, here.
    """
    if not hasattr(os, "fork"):
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    content = proto.SerializeToString()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(content, writing)
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


def _answer(content: bytes, pipe: int) -> None:
    """In the fork: "+" and the model, or "-" and why not, into the pipe; nothing of Python's own end runs."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ says when it aborts
        try:
            answer = b"+" + onnx.shape_inference.infer_shapes(content, data_prop=True).SerializeToString()
        except BaseException as error:
            answer = b"-" + str(error).encode("utf-8", "replace")
        view = memoryview(answer)
        while view:
            view = view[os.write(pipe, view) :]
    finally:
        os._exit(0)


def _whole(pipe: int, end: float) -> bytes | None:
    """All that comes through the pipe; None where the time is over before."""
    parts: list[bytes] = []
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
