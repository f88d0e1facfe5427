"""Loops over rows of a weight in C++ (runtime/kernels/rounding.h), for grids of integers and tables: `Loops.of` a grid.

The clear forms are those of `Grid`, `row_steps` and the loops of `gptq` around them; an installation without the
library of native kernels has these alone. `fit`, `nearest`, `project`, `decode` and `widened` give the very numbers
that numpy gives (`fit` not of one column, of which numpy adds several rows at once); the others add in another order.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, Codes, Grid, QParams
from qcompile.passes.algebra import Compensation
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path

# Functions of the library that are called here.
_FUNCTIONS = ("fit", "nearest", "project", "decode", "widen", "sweep", "recode", "rescale")
# Rows that are rounded in one call, and rows whose codes are set in one: as many as rounding.cpp keeps at hand.
RUN = 64
# Codes from which a call takes less than numpy's four passes.
_LEAST = 1 << 12
_HALF_OR_SINGLE = (np.dtype(np.float16), np.dtype(np.float32))
# Levels of a table at most, and the ways in which scales are stored, as rounding.h numbers them.
_PLACES, _HALF_SCALES, _SCALES = 16, 1, {"floats": 0, "powers": 2, "e4m3": 3}


class _Grid(ctypes.Structure):
    _fields_ = (
        ("qmin", ctypes.c_float),
        ("qmax", ctypes.c_float),
        ("is_signed", ctypes.c_int32),
        ("signed_scale", ctypes.c_int32),
        ("scales", ctypes.c_int32),
        ("least", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("level", ctypes.c_float * _PLACES),
        ("middle", ctypes.c_float * _PLACES),
        ("code", ctypes.c_float * _PLACES),
        ("largest", ctypes.c_float),
    )

    @classmethod
    def of(cls, spec: Grid) -> "_Grid | None":
        """None where the library has no loops for the grid."""
        half = np.dtype(spec.scale_dtype) == np.float16
        if (ends := spec.affine) is not None:
            return cls(ends.qmin, ends.qmax, spec.code_dtype is np.int8, not spec.positive, half)
        table = spec.looked_up
        if table is None or len(table.levels) > _PLACES:
            return None
        scales = _HALF_SCALES if half and table.scales == "floats" else _SCALES[table.scales]
        own = cls(scales=scales, least=table.least, most=table.most, levels=len(table.levels), largest=table.largest)
        own.level[: own.levels], own.code[: own.levels] = table.levels, table.codes
        own.middle[:] = (*table.middles, *[np.inf] * (_PLACES - len(table.middles)))
        return own


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
    """The loops for one grid of weights of float16 or float32."""

    grid: _Grid
    library: ctypes.CDLL

    @classmethod
    def of(cls, spec: Grid) -> "Loops | None":
        """Those of a grid; None where it has none."""
        library = _library()
        if library is None or np.dtype(spec.scale_dtype) not in _HALF_OR_SINGLE:
            return None
        grid = _Grid.of(spec)
        return None if grid is None else cls(grid, library)

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

    def project(self, w: Array, size: int, qparams: QParams, codes: Codes) -> None:
        """The nearest codes of w (K, N) on the parameters of each group of so many rows."""
        (k, n), w = w.shape, _rows(w)
        self._call("project", w, n, k, n, size, _rows(qparams.scale), _rows(qparams.zero_point), codes)

    def decode(self, codes: Codes, size: int, qparams: QParams) -> Array:
        """The values (K, N) that codes stand for on the parameters of each group of so many rows."""
        (k, n), codes = codes.shape, _by_rows(codes)
        scale, zero = _by_rows(qparams.scale), _by_rows(qparams.zero_point)
        if scale.strides[0] != zero.strides[0]:
            scale, zero = _rows(scale), _rows(zero)
        values = np.empty((k, n), np.float32)
        places = codes, codes.strides[0], k, n, size, scale, zero, scale.strides[0] // scale.itemsize, values
        self._call("decode", *places, strided=(codes, scale, zero))
        return values

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


class LoopedGrid(Grid):
    """A grid that is fitted, projected and decoded by its loops, where it has some."""

    def fit(self, w: Array, importance: Array | None = None) -> QParams:
        loops = None if importance is None or not w.size else Loops.of(self)
        if importance is None or loops is None:
            return super().fit(w, importance)
        own = np.asarray(importance, np.float32).reshape(len(w), -1)
        return loops.fit(w, own, self.group_size(len(w)), self.shrinks)

    def project(self, w: Array, qparams: QParams) -> Codes:
        loops = self._loops(w, qparams) if w.size else None
        if loops is None:
            return super().project(w, qparams)
        codes = np.empty(w.shape, self.code_dtype)
        loops.project(w, self.group_size(len(w)), qparams, codes)
        return codes

    def decode(self, codes: Codes, qparams: QParams) -> Array:
        known = codes.size >= _LEAST and codes.dtype == self.code_dtype
        loops = self._loops(codes, qparams) if known else None
        if loops is None:
            return super().decode(codes, qparams)
        return loops.decode(codes, self.group_size(len(codes)), qparams)

    def _loops(self, w: npt.NDArray[Any], qparams: QParams) -> Loops | None:
        """None, too, where the parameters are not float32 ones of each group of w (K, N): the loops would read beyond
        their end, numpy repeats them or says what is wrong.
        """
        whole = self.groups(len(w)), w.shape[1]
        fitting = all(own.shape == whole and own.dtype == np.float32 for own in (qparams.scale, qparams.zero_point))
        return Loops.of(self) if fitting else None


def widened(w: npt.NDArray[np.floating]) -> Array:
    """w (K, N) of any float type in float32, row by row or column by column as it lies; no copy where it is float32."""
    library = _library()
    if library is None or w.dtype != np.float16 or not w.size:
        return np.asarray(w, np.float32)
    if w.strides[1] != w.itemsize:
        return widened(w.T).T if w.strides[0] == w.itemsize else np.asarray(w, np.float32)
    (k, n), found = w.shape, np.empty(w.shape, np.float32)
    places = (ctypes.c_int64(own) for own in (w.strides[0] // w.itemsize, k, n))
    library.qcompile_widen(ctypes.c_void_p(w.ctypes.data), *places, ctypes.c_void_p(found.ctypes.data))
    return found


def _check_run(rows: int) -> None:
    """ValueError for more rows than the library has room for."""
    if rows > RUN:
        raise ValueError(f"at most {RUN} rows are rounded in one call, got {rows}")


def _by_rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or a copy where the numbers of a row do not lie side by side."""
    return values if values.strides[1] == values.itemsize and values.strides[0] > 0 else np.ascontiguousarray(values)


def _rows(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)


def _step(values: Array, n: int) -> int:
    """From one row of (K, N) to the next; 0 of (K, 1), which all columns have in common."""
    return n if values.shape[1] == n != 1 else 0
