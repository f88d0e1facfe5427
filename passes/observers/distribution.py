"""What a histogram says about an activation: how many numbers lie between its edges, evenly spread there."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """edges: float64 (n + 1,), rising, from the smallest number to the largest one. counts: float64 (n,).

    A bin without width is a number that is known exactly.
    """

    edges: Numbers
    counts: Numbers

    @cached_property
    def total(self) -> float:
        """How many numbers there are."""
        return float(self.counts.sum())

    @property
    def power(self) -> float:
        """E x² of numbers spread evenly in bins."""
        left, right = self.edges[:-1], self.edges[1:]
        return float((left**2 + left * right + right**2) @ self.counts / (3 * max(self.total, 1.0)))

    @cached_property
    def cumulative(self) -> Numbers:
        """How many numbers lie below each edge, (n + 1,)."""
        return np.concatenate([np.zeros(1), np.cumsum(self.counts)])

    def without_zero(self) -> "Distribution":
        """The same less the numbers of the bin around zero, if zero lies within."""
        counts = self.counts.copy()
        counts[(self.edges[:-1] <= 0) & (self.edges[1:] >= 0)] = 0
        return Distribution(self.edges, counts)

    def below(self, points: Numbers) -> Numbers:
        """How many numbers lie below each point."""
        return np.asarray(np.interp(points, self.edges, self.cumulative))

    def quantile(self, share: float) -> float:
        """The number below which that share of all lies."""
        return float(np.interp(share * self.total, self.cumulative, self.edges))

    def magnitude(self, share: float) -> float:
        """The magnitude below which that share of all magnitudes lies."""
        points = np.unique(np.abs(self.edges))
        within = self.below(points) - self.below(-points)
        within[-1] = self.total
        return float(np.interp(share * self.total, within, points))


def from_bins(edges: Numbers, counts: npt.NDArray[np.int64], low: float, high: float) -> Distribution:
    """The distribution of numbers between their exact extremes, one of them at each; some count is not 0.

    A lone outlier is then where it is, and not spread over its bin.
    """
    filled = np.flatnonzero(counts)
    first, last = filled[0], filled[-1]
    inner = np.clip(edges[first : last + 2], low, high)
    rest = counts[first : last + 1].astype(np.float64)
    if rest.sum() < 2:
        return Distribution(np.array([low, low]), rest[:1])
    rest[0] -= 1
    rest[-1] -= 1
    inner[0], inner[-1] = low, high
    return Distribution(np.concatenate([[low], inner, [high]]), np.concatenate([[1.0], rest, [1.0]]))
