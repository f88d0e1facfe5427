"""The arithmetic of affine quantization, once: choose_qparams, quantize, dequantize.

Weights are (K, N) with groups along K, as ONNX's blocked DequantizeLinear has them on axis 0:
value = (code - zero_point) * scale, scale and zero_point of shape (ceil(K / group_size), N).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.passes.spec import ActivationSpec, QuantSpec

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8 | np.uint8]

# Fractions of the full range tried by the clip search; 1.0 first, so that ties keep the unclipped range.
_SHRINK = tuple(1.0 - 0.03 * step for step in range(18))
# The smallest float32 scale. Its products with the scales of usual activations are normal numbers still.
LEAST_SCALE = np.float32(2.0**-120)
# Between these float16 numbers are dense enough for a scale (below the first, the spacing is more than 2^-8 of it).
_HALF_LEAST, _HALF_MOST = np.float32(2.0**-16), np.float32(65504)


@dataclass(frozen=True)
class QParams:
    """scale: float32 (groups, N), never zero. zero_point: float32 integers (groups, N), all zero when symmetric."""

    scale: Array
    zero_point: Array


@dataclass(frozen=True)
class Quantized:
    """A quantized (K, N) weight: codes int8 or uint8 (K, N) within the grid of `spec`, and their parameters."""

    codes: Codes
    qparams: QParams
    spec: QuantSpec

    def dequantize(self) -> Array:
        """The float32 (K, N) weight that the codes stand for."""
        return dequantize(self.codes, self.qparams, self.spec)


def grouped(w: Array, spec: QuantSpec, *, fill: float | None = None) -> Array:
    """w (K, N) as (groups, group_size, N); a partial last group is filled by repeating its last row, or with `fill`."""
    k, n = w.shape
    size, groups = spec.group_size(k), spec.groups(k)
    missing = groups * size - k
    if missing:
        tail = np.repeat(w[-1:], missing, axis=0) if fill is None else np.full((missing, n), fill, w.dtype)
        w = np.concatenate([w, tail])
    return w.reshape(groups, size, n)


def expand(per_group: Array, spec: QuantSpec, k: int) -> Array:
    """(groups, N) repeated to one row for each of the k input channels."""
    return np.repeat(per_group, spec.group_size(k), axis=0)[:k]


def storable(scale: Array, spec: QuantSpec) -> Array:
    """The scale as the file will hold it, never zero: a group of zeros has 1, and decodes to exact zeros.

    One below the least number that the file can hold (of float32: LEAST_SCALE) becomes that number.
    float16 models hold float16 scales. In float32 models a scale is rounded to the nearest float16 number, too, where
    that changes it by 2^-9 at most: kernels then keep two bytes of it. Codes are chosen for the rounded scale.
    """
    if np.dtype(spec.scale_dtype) == np.float32:
        magnitude = np.abs(scale)
        precise = (magnitude >= _HALF_LEAST) & (magnitude <= _HALF_MOST)
        scale = np.where(precise, np.clip(scale, -_HALF_MOST, _HALF_MOST).astype(np.float16), scale)
    half = np.dtype(spec.scale_dtype) == np.float16
    stored = scale.astype(spec.scale_dtype).astype(np.float32)
    least = np.float32(np.finfo(np.float16).smallest_subnormal) if half else LEAST_SCALE
    stored = np.where(np.abs(stored) < least, np.copysign(least, scale), stored)
    return np.where(scale == 0, np.float32(1), stored).astype(np.float32)


def choose_qparams(w: Array, spec: QuantSpec, *, importance: Array | None = None) -> QParams:
    """Scale and zero point of every group of w (K, N).

    Without `importance` the grid spans the group's range (zero included): asymmetric min..max, symmetric
    signed amax / 8 at 4 bits. With importance (K,), the mean square of each input channel, the range is shrunk to
    the fraction that minimizes the importance-weighted squared error, and each candidate is refit by least squares.
    """
    blocks = grouped(w, spec)
    if importance is None:
        return _from_range(blocks, spec, np.float32(1))
    weight = grouped(np.ascontiguousarray(importance[:, None], dtype=np.float32), spec, fill=0.0)
    best = _from_range(blocks, spec, np.float32(1))
    best_error = _weighted_error(blocks, best, spec, weight)
    for shrink in _SHRINK:
        candidate = _refit(blocks, _from_range(blocks, spec, np.float32(shrink)), spec, weight)
        error = _weighted_error(blocks, candidate, spec, weight)
        better = error < best_error
        best = QParams(
            np.where(better, candidate.scale, best.scale), np.where(better, candidate.zero_point, best.zero_point)
        )
        best_error = np.minimum(error, best_error)
    return best


def range_qparams(low: Array, high: Array, spec: ActivationSpec, *, scale_dtype: npt.DTypeLike = np.float32) -> QParams:
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


def quantize(w: Array, qparams: QParams, spec: QuantSpec) -> Codes:
    """Nearest codes of w (K, N), int8 or uint8 (K, N) whatever the bit width."""
    codes = _round(grouped(w, spec), qparams, spec)
    return codes.reshape(-1, w.shape[1])[: w.shape[0]].astype(spec.code_dtype)


def dequantize(codes: Codes, qparams: QParams, spec: QuantSpec) -> Array:
    """(code - zero_point) * scale, float32 (K, N)."""
    k = codes.shape[0]
    return (codes.astype(np.float32) - expand(qparams.zero_point, spec, k)) * expand(qparams.scale, spec, k)


def output_error(delta: Array, gram: Array) -> float:
    """‖X delta‖² of a weight change delta (K, N), from gram = XᵀX (K, K)."""
    return float(np.vdot(delta, gram @ delta))


def _from_range(blocks: Array, spec: QuantSpec, shrink: np.float32) -> QParams:
    low = np.minimum(blocks.min(axis=1), 0) * shrink
    high = np.maximum(blocks.max(axis=1), 0) * shrink
    if not spec.symmetric:
        scale = storable((high - low) / np.float32(spec.qmax), spec)
        return QParams(scale, np.clip(np.rint(-low / scale), spec.qmin, spec.qmax))
    if spec.signed_scale:
        scale = np.where(high > -low, high, low) / np.float32(spec.qmin)
    else:
        scale = np.maximum(high / np.float32(spec.qmax), low / np.float32(spec.qmin))
    scale = storable(scale, spec)
    return QParams(scale, np.zeros_like(scale))


def _round(blocks: Array, qparams: QParams, spec: QuantSpec) -> Array:
    codes = blocks / qparams.scale[:, None]
    np.rint(codes, out=codes)
    codes += qparams.zero_point[:, None]
    return np.clip(codes, spec.qmin, spec.qmax, out=codes)


def _refit(blocks: Array, qparams: QParams, spec: QuantSpec, weight: Array) -> QParams:
    """The least-squares scale for the codes that `qparams` gives; kept only where it is usable."""
    levels = _round(blocks, qparams, spec) - qparams.zero_point[:, None]
    weighted = levels * weight
    top = np.einsum("gkn,gkn->gn", weighted, blocks)
    bottom = np.einsum("gkn,gkn->gn", weighted, levels)
    scale = np.divide(top, bottom, out=qparams.scale.copy(), where=bottom > 0)
    usable = np.isfinite(scale) & (scale != 0) & (np.sign(scale) == np.sign(qparams.scale))
    return QParams(storable(np.where(usable, scale, qparams.scale), spec), qparams.zero_point)


def _weighted_error(blocks: Array, qparams: QParams, spec: QuantSpec, weight: Array) -> Array:
    residual = (_round(blocks, qparams, spec) - qparams.zero_point[:, None]) * qparams.scale[:, None] - blocks
    error: Array = np.einsum("gkn,gkn->gn", residual * weight, residual)
    return error
