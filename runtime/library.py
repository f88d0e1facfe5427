"""The shared library of native kernels: what it is, and which models it may run.

Applications in any language hand its path to ONNX Runtime (docs/deploy.md).
"""

import ctypes
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qcompile.passes.errors import UserError

DOMAIN = "qcompile"


def check_version(model: Path | str | bytes, library: Path) -> None:
    """Refuse a model whose operators are newer than the library: it would compute them as older ones, silently."""
    needed, known = operators_version(model), _known_version(library)
    if needed > known:
        raise UserError(
            f"model needs operators version {needed} of domain {DOMAIN}, this library knows {known}: upgrade "
            "qcompile-onnx, or load without the library (kernels='portable')"
        )


def chosen_kernel(library: Path) -> str:
    """The instruction set that the library uses on this machine, such as avx512vnni."""
    entry = _function(library, "qcompile_chosen_kernel")
    entry.restype = ctypes.c_char_p
    return bytes(entry()).decode()


def cuda_architectures(library: Path) -> list[str]:
    """The GPU architectures that the library holds kernels for, such as 80, 90a or 90-virtual; none without CUDA."""
    entry = _function(library, "qcompile_cuda_architectures")
    entry.restype = ctypes.c_char_p
    return [name for name in bytes(entry()).decode().split(",") if name]


def cuda_devices(library: Path) -> int:
    """GPUs that the library's kernels can use: 0 without a driver, and in a library that was built without CUDA."""
    return int(_function(library, "qcompile_cuda_devices")())


def why_no_cuda(library: Path) -> str | None:
    """Why the library computes nothing on a GPU here, and what to do about it; None where it can."""
    if not cuda_architectures(library):
        return (
            f"{library} was built without CUDA: install nvcc 12 or newer and reinstall qcompile-onnx, or run the "
            "portable bodies (kernels='portable')"
        )
    if cuda_devices(library) == 0:
        return "there is no GPU, or no CUDA driver, that the native kernels can use: run on the provider cpu"
    return None


def _known_version(library: Path) -> int:
    return int(_function(library, "qcompile_operator_version")())


def _function(library: Path, name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError) as error:
        raise UserError(f"{library} is no library of qcompile's kernels: {error}") from error


def operators_version(model: Path | str | bytes) -> int:
    """The version of domain qcompile in the model's opset imports, 0 where it has none.

    Reads the outermost fields of the file only, however large it is. A broken file is ONNX Runtime's to refuse.
    """
    opset_import, domain, version = 8, 1, 2  # field numbers of ModelProto and OperatorSetIdProto in onnx.proto
    source: BinaryIO = io.BytesIO(model) if isinstance(model, bytes) else open(model, "rb")  # noqa: SIM115
    found = 0
    with source:
        for number, value in _fields(source):
            if number == opset_import and isinstance(value, bytes):
                imported = dict(_fields(io.BytesIO(value)))
                given = imported.get(version)
                if imported.get(domain) == DOMAIN.encode() and isinstance(given, int):
                    found = max(found, given)
    return found


def _fields(source: BinaryIO, largest: int = 256) -> Iterator[tuple[int, int | bytes | None]]:
    """(field number, value) of a protobuf message; values that are no integers or short strings are skipped: None."""
    while (tag := _varint(source)) is not None:
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, _varint(source)
        elif kind == 2:
            length = _varint(source) or 0
            value = source.read(length) if length <= largest else None
            if value is None:
                source.seek(length, io.SEEK_CUR)
            yield number, value
        elif kind in (1, 5):
            source.seek(8 if kind == 1 else 4, io.SEEK_CUR)
        else:
            return


def _varint(source: BinaryIO) -> int | None:
    """The next base-128 number, None at the end."""
    number = 0
    for shift in range(0, 64, 7):
        byte = source.read(1)
        if not byte:
            return None
        number |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return number
    return None
