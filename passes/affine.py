"""The arithmetic of quantization by groups, once and for any grid: fit, project, decode.

Weights are (K, N) with groups along K, as ONNX's blocked DequantizeLinear has them on axis 0:
value = level * scale, scale of shape (ceil(K / group_size), N). A `Grid` says which levels its codes stand for: an
affine one code - zero_point, zero_point shaped like scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8 | np.uint8]

# Fractions of the full range tried by the clip search; 1.0 first, so that ties keep the unclipped range.
SHRINK = tuple(1.0 - 0.03 * step for step in range(18))
# Bits from which a grid is so fine that its ranges are not clipped, and that it serves routers.
_FINE = 8
# The smallest float32 scale. Its products with the scales of usual activations are normal numbers still.
LEAST_SCALE = np.float32(2.0**-120)
# Numbers of a weight whose ranges are searched together: what is made of them stays in a core's own cache.
_AT_ONCE = 1 << 18
# Between these float16 numbers are dense enough for a scale (below the first, the spacing is more than 2^-8 of it).
_HALF_LEAST, _HALF_MOST = np.float32(2.0**-16), np.float32(65504)


@dataclass(frozen=True)
class QParams:
    """scale: float32 (groups, N), never zero. zero_point: float32 integers (groups, N), zeros where a grid has none."""

    scale: Array
    zero_point: Array


class Grid(ABC):
    """How the codes of a weight (K, N) become numbers; a frozen dataclass, so that equal ones are one key.

    A rounding sees `fit`, `project` and `decode` only, so that it works on any grid. A grid of levels times a scale
    gives `span`, `nearest` and `levels`, and has the three from here.
    bits: of a weight, rounded up. scale_dtype: the float type of the weights: that of decoded values, and of scales
    unless the format has its own.
    """

    bits: int
    scale_dtype: npt.DTypeLike

    @property
    @abstractmethod
    def format(self) -> str:
        """The name of the weight format (passes/formats) that stores these codes."""

    @abstractmethod
    def typed(self, scale_dtype: npt.DTypeLike) -> "Grid":
        """The same for weights of that float type."""

    def ranged(self, largest: Callable[[], float]) -> "Grid":
        """The same for a weight whose largest magnitude is given when it is asked for."""
        return self

    @abstractmethod
    def group_size(self, k: int) -> int:
        """Rows of a (k, N) weight that share a scale: the block size of ONNX's blocked DequantizeLinear."""

    @abstractmethod
    def bits_per_weight(self, k: int) -> float:
        """Stored bits per weight of a (k, N) weight, scales and zero points included."""

    @abstractmethod
    def eight(self) -> "Grid":
        """Affine 8 bits with the same groups, for weights that need them."""

    @property
    def plain(self) -> "Grid":
        """The integer grid that takes its place where a DequantizeLinear alone, which looks nothing up, stands before
        the reader.
        """
        return self.eight()

    @property
    def positive(self) -> bool:
        """Whether scales must be positive."""
        return True

    @property
    def affine(self) -> "IntegerRange | None":
        """The ends of the codes of a grid of integers: levels are code - zero_point, every code between them is one,
        and ranges and scales are as those of `QuantSpec`, since `native` asks the grid for neither.
        """
        return None

    @property
    def looked_up(self) -> "LookedUp | None":
        """The table of a grid whose ranges and nearest codes are those of `TableGrid`, and how its scales are stored:
        `native` asks the grid for neither.
        """
        return None

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    @property
    def rows_per_code(self) -> int:
        """Rows of a column that one code stands for; they begin at multiples of it, and have the same code each."""
        return 1

    @property
    def fine(self) -> bool:
        """Whether the grid is so fine that nothing is gained by clipping its ranges."""
        return self.bits >= _FINE

    @property
    def shrinks(self) -> tuple[float, ...]:
        """Fractions of the full range that the clip search tries."""
        return SHRINK

    @abstractmethod
    def span(self, blocks: Array, shrink: np.float32) -> QParams:
        """Parameters (groups, N) whose grid spans a fraction of the range of each group of blocks (groups, rows, N)."""

    @abstractmethod
    def nearest(self, blocks: Array, qparams: QParams) -> Array:
        """The nearest codes of blocks (groups, rows, N), float32."""

    @abstractmethod
    def levels(self, codes: Array | Codes, zero_point: Array) -> Array:
        """What codes stand for at scale 1, float32; zero_point broadcasts to them."""

    def storable(self, scale: Array) -> Array:
        """The scale as the file will hold it, never zero."""
        return storable(scale, self.scale_dtype)

    def groups(self, k: int) -> int:
        """Number of groups along a dimension of size k, a partial last one included."""
        return -(-k // self.group_size(k)) if k else 0

    def fit(self, w: Array, importance: Array | None = None) -> QParams:
        """Parameters of every group of w (K, N).

        Without `importance` the grid spans the group's range. With importance (K,), the mean square of each input
        channel, or for each column its own (K, N), the range is shrunk to the fraction that minimizes the
        importance-weighted squared error, and each candidate is refit by least squares.
        """
        blocks = grouped(w, self)
        if importance is None:
            return self.span(blocks, np.float32(1))
        weight = grouped(np.asarray(importance, np.float32).reshape(len(w), -1), self, fill=0.0)
        step = max(1, _AT_ONCE // max(blocks[:1].size, 1))
        parts = [
            self._shrunk(blocks[start : start + step], weight[start : start + step])
            for start in range(0, len(blocks), step)
        ]
        return QParams(np.concatenate([own.scale for own in parts]), np.concatenate([own.zero_point for own in parts]))

    def _shrunk(self, blocks: Array, weight: Array) -> QParams:
        """The best of `shrinks` for blocks (groups, rows, N), weighted by (groups, rows, 1 or N)."""
        best = self.span(blocks, np.float32(1))
        best_error = _weighted_error(blocks, best, self, weight)
        for shrink in self.shrinks:
            candidate = _refit(blocks, self.span(blocks, np.float32(shrink)), self, weight)
            error = _weighted_error(blocks, candidate, self, weight)
            better = error < best_error
            best = QParams(
                np.where(better, candidate.scale, best.scale), np.where(better, candidate.zero_point, best.zero_point)
            )
            best_error = np.minimum(error, best_error)
        return best

    def project(self, w: Array, qparams: QParams) -> Codes:
        """Nearest codes of w (K, N), int8 or uint8 (K, N) whatever the bit width."""
        k = len(w)
        blocks = w[None] if k <= self.group_size(k) else grouped(w, self)
        codes = self.nearest(blocks, qparams)
        return codes.reshape(-1, w.shape[1])[: w.shape[0]].astype(self.code_dtype)

    def project_by(self, w: Array, qparams: QParams, metric: Array) -> Codes:
        """The codes of rows w (s, N) that share one, or are left over at the end: the nearest in a metric M (s, s, 1 or
        N), in which the square of d is dᵀ M d.
        """
        return self.project(w, qparams)

    def decode(self, codes: Codes, qparams: QParams) -> Array:
        """The float32 weight (K, N) that codes stand for."""
        k = codes.shape[0]
        return self.levels(codes, expand(qparams.zero_point, self, k)) * expand(qparams.scale, self, k)

    @property
    def code_dtype(self) -> type[np.int8] | type[np.uint8]:
        """The numpy type of unpacked codes, whatever the bit width."""
        return np.uint8


class IntegerRange(Protocol):
    """The smallest and the largest code of a grid of integers."""

    @property
    def qmin(self) -> int:
        """The smallest."""

    @property
    def qmax(self) -> int:
        """The largest."""


@dataclass(frozen=True)
class LookedUp:
    """A table of at most 16 levels, each once, rising; the code of each; and the middles between them, up to which a
    number goes to the lower one. largest: magnitude of a level.

    scales: as `storable` has them; powers of two, of exponents from `least` to `most`; E4M3 numbers times 2^least.
    """

    levels: tuple[float, ...]
    codes: tuple[float, ...]
    middles: tuple[float, ...]
    largest: float
    scales: Literal["floats", "powers", "e4m3"] = "floats"
    least: int = 0
    most: int = 0


class ActivationGrid(IntegerRange, Protocol):
    """What `range_qparams` reads of an activation's grid; spec.ActivationSpec."""

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle of the grid."""

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""


@dataclass(frozen=True)
class Quantized:
    """A quantized (K, N) weight: codes int8 or uint8 (K, N) within the grid of `spec`, and their parameters."""

    codes: Codes
    qparams: QParams
    spec: Grid

    def dequantize(self) -> Array:
        """The float32 (K, N) weight that the codes stand for."""
        return self.spec.decode(self.codes, self.qparams)

    def columns(self, part: slice | npt.NDArray[np.int64]) -> "Quantized":
        """Some of the columns; as views where they are a slice."""
        own = QParams(self.qparams.scale[:, part], self.qparams.zero_point[:, part])
        return Quantized(self.codes[:, part], own, self.spec)


def grouped(w: Array, spec: Grid, *, fill: float | None = None) -> Array:
    """w (K, N) as (groups, group_size, N); a partial last group is filled by repeating its last row, or with `fill`."""
    k, n = w.shape
    size, groups = spec.group_size(k), spec.groups(k)
    missing = groups * size - k
    if missing:
        tail = np.repeat(w[-1:], missing, axis=0) if fill is None else np.full((missing, n), fill, w.dtype)
        w = np.concatenate([w, tail])
    return w.reshape(groups, size, n)


def expand(per_group: Array, spec: Grid, k: int) -> Array:
    """(groups, N) repeated to one row for each of the k input channels."""
    return np.repeat(per_group, spec.group_size(k), axis=0)[:k]


def storable(scale: Array, dtype: npt.DTypeLike) -> Array:
    """The scale as a file of that type will hold it, never zero: a group of zeros has 1, and decodes to exact zeros.

    One below the least number that the file can hold (of float32: LEAST_SCALE) becomes that number.
    float16 models hold float16 scales. In float32 models a scale is rounded to the nearest float16 number, too, where
    that changes it by 2^-9 at most: kernels then keep two bytes of it. Codes are chosen for the rounded scale.
    """
    if np.dtype(dtype) == np.float32:
        magnitude = np.abs(scale)
        precise = (magnitude >= _HALF_LEAST) & (magnitude <= _HALF_MOST)
        scale = np.where(precise, np.clip(scale, -_HALF_MOST, _HALF_MOST).astype(np.float16), scale)
    half = np.dtype(dtype) == np.float16
    stored = scale.astype(dtype).astype(np.float32)
    least = np.float32(np.finfo(np.float16).smallest_subnormal) if half else LEAST_SCALE
    stored = np.where(np.abs(stored) < least, np.copysign(least, scale), stored)
    return np.where(scale == 0, np.float32(1), stored).astype(np.float32)


def range_qparams(low: Array, high: Array, spec: ActivationGrid, *, scale_dtype: npt.DTypeLike = np.float32) -> QParams:
    """Scale and zero point (both shaped like low and high) of an activation's grid that spans low … high and zero.

    A range of zero width gets scale 1. The zero point is an integer on the grid, so that zero is exact.
    scale_dtype: what the file stores. Scales are rounded up to it, so that the range stays within the grid: small ones
    are no multiples of float16's smallest number, or less than it.
    """
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    if spec.symmetric:
        width, steps = np.maximum(-low, high), spec.qmax - spec.middle
    else:
        width, steps = np.subtract(high, low, dtype=np.float64), spec.qmax - spec.qmin
    scale: Array = (np.asarray(width, np.float64) / steps).astype(np.float32)
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1)).astype(np.float32)
    stored = scale.astype(scale_dtype)
    scale = np.where(stored < scale, np.nextafter(stored, stored.dtype.type(np.inf)), stored).astype(np.float32)
    if spec.symmetric:
        return QParams(scale, np.full_like(scale, spec.middle))
    zero_point = np.clip(np.rint(np.float32(spec.qmin) - low / scale), spec.qmin, spec.qmax)
    return QParams(scale, zero_point.astype(np.float32))


def output_error(delta: Array, gram: Array) -> float:
    """‖X delta‖² of a weight change delta (K, N), from gram = XᵀX (K, K)."""
    return float(np.vdot(delta, gram @ delta))


def _refit(blocks: Array, qparams: QParams, spec: Grid, weight: Array) -> QParams:
    """The least-squares scale for the codes that `qparams` gives; kept only where it is usable."""
    levels = spec.levels(spec.nearest(blocks, qparams), qparams.zero_point[:, None])
    weighted = levels * weight
    top = np.einsum("gkn,gkn->gn", weighted, blocks)
    bottom = np.einsum("gkn,gkn->gn", weighted, levels)
    scale = np.divide(top, bottom, out=qparams.scale.copy(), where=bottom > 0)
    usable = np.isfinite(scale) & (scale != 0) & (np.sign(scale) == np.sign(qparams.scale))
    return QParams(spec.storable(np.where(usable, scale, qparams.scale)), qparams.zero_point)


def _weighted_error(blocks: Array, qparams: QParams, spec: Grid, weight: Array) -> Array:
    levels = spec.levels(spec.nearest(blocks, qparams), qparams.zero_point[:, None])
    residual = levels * qparams.scale[:, None] - blocks
    error: Array = np.einsum("gkn,gkn->gn", residual * weight, residual)
    return error
