"""The bytes of a model read once: for the hash of its files and for what is looked at in every float tensor.

Invariant: what is found of a tensor, and the digest of a file, do not depend on how the bytes are cut into pieces,
nor on where tensors lie in the file.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.tensors import chunks

# Bytes read at once: they are still in a core's own cache when they are looked at. A multiple of every element's size.
_PIECE = 1 << 19


@dataclass
class Numbers:
    """Those of a tensor of an IEEE float type: NaNs, infinite ones, those of them that are negative, and the largest
    magnitude (NaN where there is one).
    """

    dtype: ir.DataType
    nans: int = 0
    infs: int = 0
    negative: int = 0
    _largest: int = 0  # as bits

    def add(self, piece: memoryview) -> None:
        """Look at some of its bytes.

        Magnitudes are ordered as their bits are: the largest of each sign is the largest integer, signed or unsigned.
        """
        values = np.frombuffer(piece, self.dtype.numpy())
        size, bits = values.itemsize, values.view(f"<i{values.itemsize}")
        sign = 1 << (8 * size - 1)
        largest = max(int(bits.max(initial=0)), int(bits.view(f"<u{size}").max(initial=0)) & (sign - 1))
        self._largest = max(self._largest, largest)
        if largest >= self._infinity:
            infinite = np.isinf(values)
            self.nans += int(np.isnan(values).sum())
            self.infs += int(infinite.sum())
            self.negative += int((values[infinite] < 0).sum())  # of a NaN, ml_dtypes' comparison warns

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return float(np.array(self._largest, f"<u{self.dtype.bitwidth // 8}").view(self.dtype.numpy()))

    @property
    def _infinity(self) -> int:
        return int(np.array(np.inf, self.dtype.numpy()).view(f"<u{self.dtype.bitwidth // 8}"))


def numbers_of(tensor: ir.TensorProtocol) -> Numbers:
    """Of a tensor by itself."""
    found = Numbers(tensor.dtype)
    for piece in chunks(tensor):
        found.add(piece)
    return found


def read_file(file: Path, tensors: Collection[ir.ExternalTensor]) -> tuple[bytes, dict[int, Numbers]]:
    """The sha256 of a file, and what is found of those tensors that lie in it, by id; tensors that lie in others' bytes
    are left out.
    """
    digest, found = hashlib.sha256(), dict[int, Numbers]()
    buffer = memoryview(bytearray(_PIECE))
    with open(file, "rb", buffering=0) as stream:
        for length, inside in _parts(tensors):
            seen = [Numbers(inside[0].dtype)] if inside else []
            for piece in _pieces(stream, length, buffer, file if inside else None):
                digest.update(piece)
                for own in seen:
                    own.add(piece)
            found.update((id(tensor), own) for own in seen for tensor in inside)
    return digest.digest(), found


def _parts(tensors: Iterable[ir.ExternalTensor]) -> Iterator[tuple[int | None, Sequence[ir.ExternalTensor]]]:
    """(bytes, tensors that are these bytes) from the beginning of a file to its end, None: as many as there are."""
    places: dict[tuple[int, int, ir.DataType], list[ir.ExternalTensor]] = {}
    for tensor in tensors:
        places.setdefault((tensor.offset or 0, tensor.nbytes, tensor.dtype), []).append(tensor)
    position = 0
    for (offset, length, _), same in sorted(places.items(), key=lambda own: own[0][:2]):
        if offset >= position:
            yield offset - position, ()
            yield length, same
            position = offset + length
    yield None, ()


def _pieces(stream: FileIO, length: int | None, buffer: memoryview, file: Path | None) -> Iterator[memoryview]:
    """The next bytes, `length` or all, by the piece. file: one that must have them, else UserError."""
    left = math.inf if length is None else length
    while left:
        wanted, filled = int(min(left, len(buffer))), 0
        while filled < wanted and (count := stream.readinto(buffer[filled:wanted])):
            filled += count
        if filled < wanted and file is not None:
            raise UserError(f"{file} became shorter while it was read; do not change it during a compile")
        if not filled:
            return
        yield buffer[:filled]
        left -= filled
