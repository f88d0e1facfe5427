"""How a weight becomes codes. `awq` and `smooth` judge their candidates by the rounding that will follow them."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, QParams, Quantized, choose_qparams, output_error, quantize
from qcompile.passes.spec import QuantSpec
from qcompile.passes.statistics import Statistics

# Weight meta, set by `awq` for `pack`: whether ranges may be clipped.
CLIP = "qcompile.clip"


class Rounding(Protocol):
    """Quantizes a weight w (K, N) on the grid of `spec`, with the statistics of its input where there are any."""

    def __call__(self, w: Array, spec: QuantSpec, statistics: Statistics | None) -> Quantized:
        """The codes and their parameters."""


def round_to_nearest(w: Array, spec: QuantSpec, statistics: Statistics | None) -> Quantized:
    """Plain rounding on the range of each group; uses no statistics."""
    qparams = choose_qparams(w, spec)
    return Quantized(quantize(w, qparams, spec), qparams, spec)


def round_with_clip(w: Array, spec: QuantSpec, statistics: Statistics | None) -> Quantized:
    """Rounding on ranges clipped by E[x²]-weighted search, column by column only where that lowers ‖X(Ŵ - W)‖²."""
    plain = round_to_nearest(w, spec, statistics)
    if statistics is None:
        return plain
    qparams = choose_qparams(w, spec, importance=statistics.mean_square)
    clipped = Quantized(quantize(w, qparams, spec), qparams, spec)
    return better_columns(plain, clipped, w, statistics)


def better_columns(a: Quantized, b: Quantized, w: Array, statistics: Statistics) -> Quantized:
    """For each column of w, the candidate with the smaller output error."""
    error_a, error_b = (column_errors(q.dequantize() - w, statistics.gram) for q in (a, b))
    return merge_columns(a, b, error_b < error_a)


def merge_columns(a: Quantized, b: Quantized, use_b: npt.NDArray[np.bool_]) -> Quantized:
    """Columns of b where use_b (N,) says so, else of a."""
    qparams = QParams(
        np.where(use_b, b.qparams.scale, a.qparams.scale),
        np.where(use_b, b.qparams.zero_point, a.qparams.zero_point),
    )
    return Quantized(np.where(use_b, b.codes, a.codes), qparams, a.spec)


def column_errors(delta: Array, gram: Array) -> Array:
    """‖X delta‖² of each column of delta (K, N), float32 (N,)."""
    errors: Array = np.einsum("kn,kn->n", delta, gram @ delta)
    return errors


def relative_error(delta: Array, w: Array, gram: Array) -> float:
    """‖X delta‖ / ‖X w‖, from gram = XᵀX."""
    reference = output_error(w, gram)
    return float(np.sqrt(output_error(delta, gram) / reference)) if reference > 0 else 0.0
