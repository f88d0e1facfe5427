"""Distances between a model and its reference: next-token scores from logits, noise of any output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.passes.errors import UserError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Rows of logits worked on at a time: 64 x 49152 float32 is 12 MB, and a few such buffers live at once.
ROWS = 64
# Nats of which float64 still has the exponential.
_MOST = 700.0


def log_softmax(logits: npt.NDArray[Any]) -> Floats:
    """Logarithms of the softmax over the last axis of logits (rows, V) of any float type; sums in float64."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def kl_divergence(known: Floats, scores: Floats) -> Doubles:
    """KL(known ‖ scores) of each row of log-softmaxes (rows, V), nats. What cannot come adds 0 (lim p→0 of p log p)."""
    possible, difference = np.exp(known), np.zeros_like(known)
    np.subtract(known, scores, out=difference, where=known > -np.inf)
    divergence: Doubles = (possible * difference).sum(axis=-1, dtype=np.float64)
    return divergence


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where float64 has no such number."""
    return math.exp(nll) if nll < _MOST else math.inf


@dataclass
class TokenScores:
    """Scores of every next-token prediction so far, arrays of a few tokens each: nats, nats, booleans.

    right: whether the most likely token is the one that follows. place: how many tokens of the window stand before it.
    """

    nll: list[Doubles] = field(default_factory=list)
    kl: list[Doubles] = field(default_factory=list)
    agree: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    right: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    place: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, logits: npt.NDArray[Any], targets: npt.NDArray[np.int64], reference: Floats | None) -> None:
        """Score logits (L, V) against the tokens that follow, targets (L,), and the reference's log_softmax (L, V)."""
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            scores = log_softmax(logits[rows])
            wanted, first = targets[rows], scores.argmax(axis=-1)
            self.nll.append(-scores[np.arange(len(wanted)), wanted].astype(np.float64))
            self.right.append(first == wanted)
            self.place.append(np.arange(start, start + len(wanted)) + 1)
            if reference is not None:
                known = reference[rows]
                self.kl.append(kl_divergence(known, scores))
                self.agree.append(known.argmax(axis=-1) == first)

    def extend(self, other: "TokenScores") -> None:
        """Take in another's windows."""
        for own in fields(self):
            getattr(self, own.name).extend(getattr(other, own.name))


def log_softmax_rows(logits: npt.NDArray[Any]) -> Floats:
    """log_softmax of logits (L, V), a few rows at a time."""
    out = np.empty(logits.shape, np.float32)
    for start in range(0, len(logits), ROWS):
        out[start : start + ROWS] = log_softmax(logits[start : start + ROWS])
    return out


def mean_and_error(values: Sequence[Doubles]) -> tuple[float, float]:
    """The mean and its standard error, taking the values as independent."""
    flat = np.concatenate(values)
    error = flat.std(ddof=1) / np.sqrt(len(flat)) if len(flat) > 1 else np.nan
    return float(flat.mean()), float(error)


def relative_deviation(noise: Doubles, signal: Doubles) -> float | None:
    """The standard error of sqrt(sum of noise / sum of signal) over rows (R,), by the delta method.

    Rows are taken as independent. None of one row, and of rows that are not finite or all zero.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(signal.sum())
        if len(noise) < 2 or not np.isfinite(noise).all() or not np.isfinite(total) or not total:
            return None
        ratio = float(noise.sum()) / total
        deviation = float((noise - ratio * signal).std(ddof=1)) * math.sqrt(len(noise)) / total
    return deviation / (2 * math.sqrt(ratio)) if ratio > 0 else 0.0


# Numbers of an output that are compared at once.
_NUMBERS = 1 << 20


@dataclass
class OutputNoise:
    """How far an output is from the reference's, over all batches: sums of squares and of products in float64."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    product: float = 0.0
    size: int = 0
    rows: list[tuple[Doubles, Doubles]] = field(default_factory=list)

    def add(self, reference: npt.NDArray[Any], output: npt.NDArray[Any]) -> None:
        """Two arrays of one shape and any number type. rows: (noise, signal) of the indices of the first axis."""
        rows = len(reference) if reference.ndim else 1
        noise, signal = np.zeros(rows), np.zeros(rows)
        wide, step = reference.size // max(rows, 1), max(_NUMBERS // max(rows, 1), 1)
        for start in range(0, wide, step):
            part = np.s_[:, start : start + step]
            a, b = (own.reshape(rows, wide)[part].astype(np.float64) for own in (reference, output))
            noise += np.square(a - b).sum(axis=1)
            signal += np.square(a).sum(axis=1)
            self.power += float(np.vdot(b, b))
            self.product += float(np.vdot(a, b))
        if reference.size:
            self.rows.append((noise, signal))
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        self.size += reference.size

    @property
    def sqnr(self) -> float:
        """Signal over noise in dB; infinite for equal outputs."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal else float("-inf")

    @property
    def relative(self) -> float:
        """‖output - reference‖ / ‖reference‖; 0 of equal ones, 1 where the reference alone is zero."""
        return math.sqrt(self.noise / self.signal) if self.signal else float(self.noise > 0)

    @property
    def deviation(self) -> float | None:
        """The standard error of `relative` over rows."""
        parts = [np.concatenate(part) for part in zip(*self.rows, strict=True)] if self.rows else []
        return relative_deviation(*parts) if parts else None

    @property
    def cosine(self) -> float:
        """Cosine between the two outputs as vectors; 1 for two zero vectors."""
        length = float(np.sqrt(self.signal * self.power))
        return self.product / length if length else float(self.signal == self.power)


def check_finite_output(array: npt.NDArray[Any], name: str, model: str) -> None:
    """Refuse NaN and infinity in an output of a model."""
    if array.dtype.kind in "fV" and not np.isfinite(array).all():
        raise UserError(f"{model}: output {name!r} contains NaN or infinity")
