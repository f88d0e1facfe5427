"""Two models on the same decisions: what each alone got right, and how sure that is. All intervals are of 95 %."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Interval = tuple[float, float]
# The normal quantile of 97.5 %.
_Z = 1.959963984540054
# Student's, of so few degrees of freedom that expansions fail: by one they would be 24 % too narrow.
_FEW = {1: 12.706204736174696, 2: 4.302652729749462}


@dataclass(frozen=True)
class Paired:
    """Decisions that two models take, each independent of the others.

    reference, accuracy: share that each gets right. lost, won: how many the reference, the model alone gets right.
    accuracy_drop: reference - accuracy, with its interval (`newcombe`). mcnemar_p: the chance of lost and won as uneven
    as these where neither model is better (`mcnemar`).
    """

    count: int
    reference: float
    accuracy: float
    lost: int
    won: int
    accuracy_drop: float
    accuracy_drop_low: float
    accuracy_drop_high: float
    mcnemar_p: float

    def told(self) -> str:
        """In a line."""
        interval = f"[{self.accuracy_drop_low:+.1%}, {self.accuracy_drop_high:+.1%}]"
        return (
            f"reference {self.reference:.1%}, {self.lost} lost, {self.won} won, drop {self.accuracy_drop:+.1%} "
            f"{interval}, McNemar's p {self.mcnemar_p:.2g}"
        )

    @classmethod
    def of(cls, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> "Paired":
        """From what the reference and the model got right, one boolean a decision; ValueError without any."""
        if before.shape != after.shape or not before.size:
            raise ValueError(f"decisions of shape {before.shape} and {after.shape}")
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        both = int((before & after).sum())
        low, high = newcombe(both, lost, won, before.size - both - lost - won)
        right = float(before.mean()), float(after.mean())
        return cls(before.size, *right, lost, won, right[0] - right[1], low, high, mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: the two-sided p of so uneven a split of the decisions that differ (binomial, a half)."""
    count = lost + won
    term, tail = 1, 0
    for index in range(min(lost, won) + 1):
        tail += term
        term = term * (count - index) // (index + 1)
    return min(1.0, 2 * tail / (1 << count))


def wilson(share: float, count: float, quantile: float = _Z) -> Interval:
    """The score interval of a share of `count` independent decisions (Wilson 1927); inside 0 to 1 at both ends."""
    spread = quantile**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(both: float, lost: float, won: float, neither: float, quantile: float = _Z) -> Interval:
    """The interval of (lost - won) / count, the difference of two paired shares (Newcombe 1998, method 10)."""
    count = both + lost + won + neither
    shares = ((both + lost) / count, (both + won) / count)
    (low_a, high_a), (low_b, high_b) = (wilson(share, count, quantile) for share in shares)
    cross = both * neither - lost * won
    sides = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    phi = (min(cross, 0) + max(cross - count / 2, 0)) / math.sqrt(sides) if sides else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = shares[0] - shares[1]
    low = difference - reach(shares[0] - low_a, high_b - shares[1])
    return low, difference + reach(high_a - shares[0], shares[1] - low_b)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish and Fisher's expansion: 0.03 % off for 7 degrees, 0.8 % for 3)."""
    z, v = _Z, freedom
    if v in _FEW:
        return _FEW[v]
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


@dataclass(frozen=True)
class Clusters:
    """Which decisions belong together. index: the cluster of each, 0 to count - 1, none of them empty."""

    index: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many clusters."""
        return int(self.index.max()) + 1 if self.index.size else 0

    def error(self, values: Doubles) -> float | None:
        """The standard error of the mean of values (N,), of which those of a cluster depend on each other.

        That of a ratio of sums over clusters (Cochran 1977, 11.12); None of one cluster.
        """
        if self.count < 2:
            return None
        with np.errstate(invalid="ignore"):
            off = np.bincount(self.index, weights=values - values.mean())
        return math.sqrt(float(np.square(off).sum()) * self.count / (self.count - 1)) / len(values)

    def mean(self, values: Doubles) -> Interval | None:
        """The interval of the mean of values (N,), by t; None of one cluster, and of values that are not finite."""
        error = self.error(values)
        if error is None or not math.isfinite(error):
            return None
        half = student(self.count - 1) * error
        return float(values.mean()) - half, float(values.mean()) + half

    def share(self, hits: npt.NDArray[np.bool_]) -> Interval | None:
        """The interval of the share of hits (N,): Wilson's, of as many decisions as the clusters are worth.

        Their design effect, at least 1, divides the count (Korn and Graubard 1998); None of one cluster.
        """
        effect = self._effect(hits.astype(np.float64))
        return None if effect is None else wilson(float(hits.mean()), len(hits) / effect, student(self.count - 1))

    def drop(self, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Interval | None:
        """The interval of the share of before less that of after (N,): Newcombe's, of as many decisions as for `share`.

        Unlike that of a mean it is not empty where no decision differs.
        """
        effect = self._effect(before.astype(np.float64) - after)
        if effect is None:
            return None
        four = (before & after, before & ~after, after & ~before, ~before & ~after)
        both, lost, won, neither = (float(own.sum()) / effect for own in four)
        return newcombe(both, lost, won, neither, student(self.count - 1))

    def _effect(self, values: Doubles) -> float | None:
        """How much more the mean of values varies than that of as many independent ones, at least 1."""
        error, plain = self.error(values), float(values.var()) / len(values)
        return None if error is None else max(error**2 / plain, 1.0) if plain else 1.0
