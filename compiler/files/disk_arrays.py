"""Arrays put aside until they are read again: the first ones in memory, the others in a temporary file."""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from qcompile.passes.errors import UserError

# The folder of temporary files, where the system's own is too small.
VARIABLE = "QCOMPILE_TMP"
# Bytes that one Spill keeps in memory. A walk has two at a time: what enters a segment and what leaves it.
BUDGET = 32 << 20

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Place:
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


# An array, or its place. Those of objects are never in a file.
Slot = _Place | Array


class Spill(Sequence[Array]):
    """Arrays in the order they came, read one at a time; `budget` bytes of them stay in memory.

    The file has no name (or, on Windows, goes when it is closed): nothing is left behind, whatever ends the process.
    An array that stays in memory is the one given, so it must not change later.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self._left = budget
        self._slots: list[Slot] = []
        self._file: Any = None
        self._end = 0
        self._stored, self._first = None, 0  # a file that `dump` wrote, and how many arrays lie in it

    @classmethod
    def stored(cls, file: Any, slots: Sequence[Slot]) -> "Spill":
        """One with the arrays that `dump` wrote to a file, which is read as long as it is there."""
        made = cls()
        made._slots, made._stored, made._first = list(slots), file, len(slots)
        return made

    def dump(self, file: BinaryIO) -> list[Slot]:
        """Append the arrays to a file, one in memory at a time; returns what `stored` takes."""
        slots: list[Slot] = []
        for array in self:
            if array.dtype.hasobject:
                slots.append(array)
            else:
                slots.append(_Place(file.tell(), array.shape, array.dtype))
                file.write(_bytes(np.ascontiguousarray(array)))
        return slots

    def append(self, array: Array) -> int:
        """Put an array behind the others; returns its number. UserError where the file system does not take it."""
        if array.dtype.hasobject or array.nbytes <= self._left:
            self._left -= array.nbytes
            self._slots.append(array)
        else:
            self._slots.append(_Place(self._end, array.shape, array.dtype))
            with _told():
                self._write(_bytes(np.ascontiguousarray(array)))
        return len(self._slots) - 1

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Array]": ...
    def __getitem__(self, index: int | slice) -> "Array | list[Array]":
        """The array of a number, as it was given: equal in every bit."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        slot = self._slots[index]
        if not isinstance(slot, _Place):
            return slot
        array = np.empty(slot.shape, slot.dtype)
        with _told():
            _read(self._stored if index % len(self) < self._first else self._file, slot.offset, _bytes(array))
        return array

    def _write(self, data: memoryview) -> None:
        if self._file is None:
            folder = os.environ.get(VARIABLE) or None
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 (closed with the Spill)
            weakref.finalize(self, self._file.close)
        self._file.seek(self._end)
        self._end += len(data)
        while data:  # a raw file may take a part
            data = data[self._file.write(data) :]


def _read(file: Any, offset: int, into: memoryview) -> None:
    file.seek(offset)
    while into:
        count = file.readinto(into)
        if not count:
            raise OSError("it became shorter")
        into = into[count:]


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


@contextmanager
def _told() -> Iterator[None]:
    """Failures of the temporary file as UserErrors."""
    try:
        yield
    except OSError as error:
        folder = os.environ.get(VARIABLE) or "the temporary folder"
        raise UserError(
            f"cannot keep calibration activations in {folder}: {error.strerror or error}; "
            f"free some space or set {VARIABLE} to a folder with more"
        ) from error
