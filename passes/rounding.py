"""How a weight becomes codes. `awq` and `smooth` judge their candidates by the rounding that will follow them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, Grid, QParams, Quantized, output_error
from qcompile.passes.held import confirmed, too_few
from qcompile.passes.statistics import Statistics

# Of so many rows one may be held aside and not be fitted to at all: the fit is as good.
_SMALL_SHARE = 16


# A weight quantized by the statistics of its input.
Fit = Callable[[Statistics], Quantized]


class Rounding(Protocol):
    """Quantizes a weight w (K, N) on the grid of `spec`, with the statistics of its input where there are any."""

    def __call__(self, w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
        """The codes and their parameters."""


def round_to_nearest(w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
    """Plain rounding on the range of each group; uses no statistics."""
    qparams = spec.fit(w)
    return Quantized(spec.project(w, qparams), qparams, spec)


def blank(w: Array, spec: Grid) -> Quantized:
    """Codes of the sizes that those of w have, all of them 0: for a dry run, which reads no weight."""
    k, n = w.shape
    ones = np.broadcast_to(np.float32(1), (spec.groups(k), n))
    codes = np.broadcast_to(np.zeros((), spec.code_dtype), (k, n))
    return Quantized(codes, QParams(ones, np.broadcast_to(np.float32(0), ones.shape)), spec)


def round_with_clip(w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
    """Rounding on ranges clipped by E[x²]-weighted search, column by column only where that lowers ‖X(Ŵ - W)‖²; plain
    rounding where rows held aside do not confirm that.
    """
    plain = round_to_nearest(w, spec, statistics)
    if statistics is None:
        return plain
    return fitted(w, statistics, lambda rows: _clipped(w, spec, plain, rows), [lambda rows: plain]) or plain


def _clipped(w: Array, spec: Grid, plain: Quantized, statistics: Statistics) -> Quantized:
    qparams = spec.fit(w, statistics.energy)
    return better_columns(plain, Quantized(spec.project(w, qparams), qparams, spec), w, statistics)


def fitted(w: Array, statistics: Statistics, make: Fit, others: Sequence[Fit]) -> Quantized | None:
    """What `make` fits to the statistics of all rows; None where rows held aside show no gain over each of the
    `others`, all fitted to the same rows.

    Case 1: guessed statistics, or those that `split` gave to somebody who judges: nothing is held aside.
    Case 2: too few rows: None.
    Case 3: of many rows, those held aside are a small share, and what was judged is what is given.
    """
    if statistics.sample is None:  # Case 1
        return make(statistics)
    parts = statistics.split()
    if parts is None or too_few(statistics):  # Case 2
        return None
    rest, held = parts
    trial = make(rest)
    made = (trial, *(other(rest) for other in others))
    losses = [np.square(held @ (own.dequantize() - w)).sum(axis=1) for own in made]
    if any(confirmed(other, losses[0], statistics) >= 1 for other in losses[1:]):
        return None
    return trial if len(held) * _SMALL_SHARE <= statistics.rows else make(statistics)  # Case 3


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
