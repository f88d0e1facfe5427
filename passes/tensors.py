"""Reading weights without keeping them: bytes by the chunk, arrays on mappings of their own, lazy transformations."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.errors import UserError

_CHUNK = 8 << 20
# Key of a tensor's `meta`: its largest magnitude, where it was looked at before.
LARGEST = "qcompile.largest"


def chunks(tensor: ir.TensorProtocol, size: int = _CHUNK) -> Iterator[memoryview]:
    """The bytes of the tensor as a file holds them (little endian, packed), `size` bytes at a time.

    A file is read rather than mapped, so that its pages do not count as this process's memory.
    """
    if isinstance(tensor, ir.LazyTensor):
        yield from chunks(tensor.raw(), size)
    elif isinstance(tensor, ir.ExternalTensor):
        yield from _file_chunks(tensor, size)
    else:
        packed = tensor.dtype.bitwidth < 8
        data = np.frombuffer(tensor.tobytes(), np.uint8) if packed else np.ascontiguousarray(tensor.numpy())
        flat = data.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, size):
            yield flat[start : start + size].data


def largest(tensor: ir.TensorProtocol) -> float:
    """The largest magnitude of a tensor of floats; it is read where nobody did that before."""
    if LARGEST not in tensor.meta:
        parts = (np.frombuffer(chunk, tensor.dtype.numpy()) for chunk in chunks(tensor))
        tensor.meta[LARGEST] = max((float(np.abs(part).max(initial=0)) for part in parts), default=0.0)
    return float(tensor.meta[LARGEST])


def read(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The tensor as an array whose memory goes with it.

    ExternalTensor.numpy() keeps its mapping, and every page ever read, for as long as the model lives.
    """
    return _unshared(tensor).numpy()


def lazy(
    source: ir.TensorProtocol,
    function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    *,
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
    name: str | None = None,
) -> ir.LazyTensor:
    """A tensor that is `function` of the source's array, computed anew whenever it is read; `dtype` as the source's."""
    return computed(lambda: function(read(source)), shape=shape, dtype=dtype or source.dtype, name=name)


def computed(
    function: Callable[[], npt.NDArray[Any]], *, shape: tuple[int, ...], dtype: ir.DataType, name: str | None = None
) -> ir.LazyTensor:
    """A tensor that is what `function` gives, asked anew whenever it is read."""
    return ir.LazyTensor(lambda: ir.Tensor(function(), dtype), dtype, ir.Shape(shape), name=name)


def _unshared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )


def _file_chunks(tensor: ir.ExternalTensor, size: int) -> Iterator[memoryview]:
    left = tensor.nbytes
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            data = file.read(min(left, size))
            if not data:
                raise UserError(f"{tensor.path} became shorter while it was read; do not change it during a compile")
            left -= len(data)
            yield memoryview(data)
