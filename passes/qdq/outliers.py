"""Outlier channels: which ones are worth keeping in float, by the noise that they cause."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array

# Codes from one end of an activation's grid to the other, and from zero to the end of a weight's.
_ACTIVATION_STEPS, _WEIGHT_STEPS = 255, 127
# What having a float part counts as, in channels: it takes time of its own (docs/qdq.md).
_FIXED = 3
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """channels: int64 (k,), ascending. noise: power of the rounding noise with them in float, over that without."""

    channels: npt.NDArray[np.int64]
    noise: float


class Judge(Protocol):
    """Chooses the channels that stay in float, and judges them by rows that it has not seen.

    reach (K,): largest magnitude of each channel. power (K,): its mean square.
    """

    def choose(self, reach: Array, power: Array, *, most: int, threshold: float) -> Choice:
        """At most so many channels."""

    def noise(self, channels: npt.NDArray[np.int64], reach: Array, power: Array) -> float:
        """Noise with these channels in float, over that without."""


@dataclass(frozen=True, eq=False)
class Rounded(Judge):
    """Where the activation is rounded to 8 bits as all `weights` (K, N) are that multiply it."""

    weights: Sequence[Array]

    def choose(self, reach: Array, power: Array, *, most: int, threshold: float) -> Choice:
        return choose(reach, power, self.weights, most=most, threshold=threshold)

    def noise(self, channels: npt.NDArray[np.int64], reach: Array, power: Array) -> float:
        return noise_of(channels, reach, power, self.weights)


@dataclass(frozen=True, eq=False)
class WeightsAlone(Judge):
    """Where the activation stays in float. errors (K,): squared rounding errors of each row, over all columns.

    Errors of rows are taken as independent: their noise is Σ power_k · errors_k. That the scales of what stays become
    smaller with what they are shared with is not counted.
    """

    errors: _Floats

    def choose(self, reach: Array, power: Array, *, most: int, threshold: float) -> Choice:
        noise = self.errors * power
        order = np.argsort(-noise, kind="stable")[: most + 1]
        return _cheapest(order, _left(noise, order), threshold)

    def noise(self, channels: npt.NDArray[np.int64], reach: Array, power: Array) -> float:
        noise = self.errors * power
        return float(np.delete(noise, channels).sum() / noise.sum()) if noise.any() else 1.0


def choose(reach: Array, power: Array, weights: Sequence[Array], *, most: int, threshold: float) -> Choice:
    """The channels that stay in float of an activation which all `weights` (K, N) multiply.

    reach (K,): largest magnitude of each channel. power (K,): its mean square. Channels are taken in order of falling
    reach; of the first `most`, as many as make noise / (1 - threshold) ** cost least, where noise is, with S in float,

        step(S)² / 12 · Σ ‖w_k‖² + Σ power_k · Σ s_n(S)² / 12        sums over k not in S, and over all columns n

    step = 2 max reach / 255 is the common step of the activation, s_n = max |w_kn| / 127 that of a weight's column.
    Rounding errors are taken as independent and evenly spread. cost: channels, and 3 for having a float part at all.
    """
    order = np.argsort(-reach, kind="stable")[: most + 1]
    energy = row_power(weights)
    steps = 2 * reach[order].astype(np.float64) / _ACTIVATION_STEPS
    spread = np.sum([_spread(w, order[:-1]) for w in weights], axis=0)
    return _cheapest(order, (steps**2 * _left(energy, order) + _left(power, order) * spread) / 12, threshold)


def _cheapest(order: npt.NDArray[np.int64], noise: _Floats, threshold: float) -> Choice:
    """As many channels of the order as make noise / (1 - threshold) ** cost least; noise: with 0, 1, … of them out."""
    if not noise[0] > 0:
        return Choice(np.zeros(0, np.int64), 1.0)
    prices = np.array([price(count) for count in range(len(order))]) * -np.log1p(-threshold)
    k = int(np.argmin(np.log(np.maximum(noise / noise[0], 1e-12)) + prices))
    return Choice(np.sort(order[:k]).astype(np.int64), float(noise[k] / noise[0]))


def price(channels: int) -> int:
    """What so many channels in float cost, in channels."""
    return channels + _FIXED if channels else 0


def noise_of(channels: npt.NDArray[np.int64], reach: Array, power: Array, weights: Sequence[Array]) -> float:
    """The noise of `choose` with these channels in float over that without, for other rows than they were chosen by."""
    others = np.delete(np.arange(len(reach)), channels)
    spread = np.sum([_spread(w, channels) for w in weights], axis=0)
    energy, steps = row_power(weights), 2 * reach.astype(np.float64) / _ACTIVATION_STEPS
    without = steps.max() ** 2 * energy.sum() + float(power.sum()) * spread[0]
    left = steps[others].max() ** 2 * energy[others].sum() + float(power[others].sum()) * spread[-1]
    return float(left / without) if without > 0 else 1.0


def row_power(weights: Sequence[Array]) -> _Floats:
    """Σ w², (K,), over the columns of all the weights (K, N)."""
    return np.asarray(np.sum([np.einsum("kn,kn->k", w, w, dtype=np.float64) for w in weights], axis=0))


def _left(per_channel: npt.NDArray[np.floating], order: npt.NDArray[np.int64]) -> _Floats:
    """The sums (len(order),) over all channels but the first 0, 1, … of the order."""
    taken = np.concatenate([[0.0], np.cumsum(per_channel[order[:-1]], dtype=np.float64)])
    return np.maximum(np.sum(per_channel, dtype=np.float64) - taken, 0)


def _spread(w: Array, order: npt.NDArray[np.int64]) -> _Floats:
    """Σ s_n² over columns of w (K, N) without the rows that are the first 0, 1, … of the order, (len(order) + 1,)."""
    stay = np.ones(len(w), bool)
    stay[order] = False
    peaks = np.abs(w[stay]).max(axis=0, initial=0)
    sums = [np.sum(np.square(peaks, dtype=np.float64))]
    for row in order[::-1]:
        peaks = np.maximum(peaks, np.abs(w[row]))
        sums.append(np.sum(np.square(peaks, dtype=np.float64)))
    return np.array(sums[::-1]) / _WEIGHT_STEPS**2
