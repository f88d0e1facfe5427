"""Loops over rows of a weight in C++ (runtime/kernels/rounding.h), for grids of integers: `Loops.of` a grid.

The clear forms are `Grid.fit`, `row_steps` and the loops of `gptq` around them; an installation without the library of
native kernels has these alone. `fit` and `nearest` give the very numbers that numpy gives (`fit` not of one column, of
which numpy adds several rows at once); the others add in another order.
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, Codes, Grid, QParams
from qcompile.passes.algebra import Compensation
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path

# Functions of the library that are called here.
_FUNCTIONS = ("fit", "nearest", "sweep", "recode", "rescale")
# Rows that are rounded in one call, and rows whose codes are set in one: as many as rounding.cpp keeps at hand.
RUN = 64
_HALF_OR_SINGLE = (np.dtype(np.float16), np.dtype(np.float32))


class _Grid(ctypes.Structure):
    _fields_ = (
        ("qmin", ctypes.c_float),
        ("qmax", ctypes.c_float),
        ("is_signed", ctypes.c_int32),
        ("signed_scale", ctypes.c_int32),
        ("half", ctypes.c_int32),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library of native kernels; None where there is none, or one built before it had all of these loops."""
    try:
        found = ctypes.CDLL(str(library_path()))
    except (UserError, OSError):
        return None
    return found if all(hasattr(found, f"qcompile_{name}") for name in _FUNCTIONS) else None


@dataclass(frozen=True, eq=False)
class Loops:
    """The loops for one grid of integers whose scales are stored as float16 or float32 numbers."""

    grid: _Grid
    library: ctypes.CDLL

    @classmethod
    def of(cls, spec: Grid) -> "Loops | None":
        """Those of a grid; None where it has none."""
        ends, library = spec.affine, _library()
        if ends is None or library is None or np.dtype(spec.scale_dtype) not in _HALF_OR_SINGLE:
            return None
        half = np.dtype(spec.scale_dtype) == np.float16
        return cls(_Grid(ends.qmin, ends.qmax, spec.code_dtype is np.int8, not spec.positive, half), library)

    def fit(self, w: Array, importance: Array, size: int, shrinks: tuple[float, ...]) -> QParams:
        """`Grid.fit` of w (K, N) for groups of so many rows, with importance (K, 1) or (K, N)."""
        (k, n), tried = w.shape, np.array(shrinks, np.float32)
        w, importance = _rows(w), _rows(importance)
        scale, zero = np.empty((2, -(-k // size), n), np.float32)
        self._call("fit", w, n, k, n, size, importance, _step(importance, n), tried, len(tried), scale, zero)
        return QParams(scale, zero)

    def nearest(self, w: npt.NDArray[np.floating], size: int, codes: Codes, scale: Array, zero: Array) -> None:
        """The nearest codes of w (K, N), float16 or float32, on the range of each group of so many rows, in parts
        of codes (K, N), scale and zero points (groups, N), of which each row lies together.
        """
        if w.dtype not in _HALF_OR_SINGLE or w.strides[1] != w.itemsize:
            w = np.ascontiguousarray(w, w.dtype if w.dtype in _HALF_OR_SINGLE else np.float32)
        (k, n), half = w.shape, w.dtype == np.float16
        step, step_scale, step_codes = (own.strides[0] // own.itemsize for own in (w, scale, codes))
        places = w, half, step, k, n, size, scale, zero, step_scale, codes, step_codes
        self._call("nearest", *places, strided=(w, scale, zero, codes))

    def sweep(
        self,
        by: Compensation,
        part: slice,
        w: Array,
        qparams: QParams,
        size: int,
        codes: Codes,
        left: Array,
        spread: Array,
    ) -> None:
        """Round a part, at most RUN, of the rows of w (K, N) in the order of `by`, the last first, as `gptq._Sweep`."""
        _check_run(part.stop - part.start)
        n, energy = w.shape[1], _rows(by.scale)
        place = part.start, part.stop, n, size, by.order, by.lower, by.lower.shape[1], energy, _step(energy, n)
        self._call("sweep", *place, w, qparams.scale, qparams.zero_point, codes, left, spread)

    def recode(self, gram: Array, added: Array, pull: Array, scale: Array, zero: Array, levels: Array) -> Array:
        """Set levels (s, N) of at most RUN rows of a group to their best, one row after another; returns by how much
        their values change (s, N).

        gram: G's part of them (s, s), `added` (s,) to its diagonal. pull: their rows of G (W - Ŵ). scale, zero (N,).
        """
        count, n = levels.shape
        _check_run(count)
        change, step = np.empty((count, n), np.float32), gram.strides[0] // gram.itemsize
        self._call("recode", count, n, gram, step, added, pull, scale, zero, levels, change, strided=(gram,))
        return change

    def rescale(self, first: int, levels: Array, product: Array, pull: Array, scale: Array, change: Array) -> None:
        """Set the scale (N,) of a group with levels (s, N), which are rows of a block from the `first` on, to that of
        least error which a file can hold.

        product: G by these levels, the block's rows (M, N). pull (M, N) and change (s, N), of values, follow it.
        """
        (count, n), total = levels.shape, len(pull)
        self._call("rescale", total, first, count, n, levels, product, pull, scale, change)

    def _call(
        self, name: str, *values: int | npt.NDArray[np.generic], strided: tuple[npt.NDArray[np.generic], ...] = ()
    ) -> None:
        """A function of the library: numbers as int64, arrays by where they begin, which lie there row by row."""
        given = list[object]()
        for value in values:
            if not isinstance(value, np.ndarray):
                given.append(ctypes.c_int64(value))
                continue
            if not any(value is own for own in strided) and not value.flags.c_contiguous:
                raise ValueError(f"{name} takes arrays that lie row by row, not one of strides {value.strides}")
            given.append(ctypes.c_void_p(value.ctypes.data))
        getattr(self.library, f"qcompile_{name}")(ctypes.byref(self.grid), *given)


def _check_run(rows: int) -> None:
    """ValueError for more rows than the library has room for."""
    if rows > RUN:
        raise ValueError(f"at most {RUN} rows are rounded in one call, got {rows}")


def _rows(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)


def _step(values: Array, n: int) -> int:
    """From one row of (K, N) to the next; 0 of (K, 1), which all columns have in common."""
    return n if values.shape[1] == n != 1 else 0
