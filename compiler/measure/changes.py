"""What became of a decoder's predictions, token by token: flips, percentiles of KL, and KL by position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.compiler.measure.metrics import TokenScores, mean_and_error, perplexity
from qcompile.compiler.measure.paired import Clusters

# Tokens before the one predicted at which a bin of positions begins.
_BINS = (1, 32, 128, 512, 2048, 8192, 32768)
# Windows are what depends on each other inside, where there are so many; else runs of so many tokens.
_WINDOWS, _RUN = 8, 64
_NONE = (None, None)


@dataclass(frozen=True)
class PositionScores:
    """KL of the tokens that stand behind `first` to `last` others in their window, nats, with its standard error."""

    first: int
    last: int
    tokens: int
    kl: float
    kl_error: float | None


@dataclass(frozen=True)
class TokenChanges:
    """A decoder against its reference on the same tokens. Names that end in _low and _high: the ends of 95 % intervals.

    flips: share of tokens for which another token is the most likely now. flips_lost, flips_won: shares for which the
    reference alone, the model alone has the token that follows as the most likely one; reference_accuracy: the
    reference's share of those, accuracy_drop: what was lost of it (flips_lost - flips_won). perplexity_ratio: to the
    reference's. kl_low, kl_high: of the mean KL, nats. kl_p50, kl_p90, kl_p99, kl_max: percentiles of KL over tokens,
    nats. clusters: by which intervals are made, since neighbouring tokens depend on each other: windows, or runs of 64
    tokens where there are fewer than 8.
    """

    flips: float
    flips_low: float | None
    flips_high: float | None
    flips_lost: float
    flips_won: float
    reference_accuracy: float
    accuracy_drop: float
    accuracy_drop_low: float | None
    accuracy_drop_high: float | None
    perplexity_ratio: float
    perplexity_ratio_low: float | None
    perplexity_ratio_high: float | None
    kl_low: float | None
    kl_high: float | None
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    clusters: int
    kl_by_position: Sequence[PositionScores]

    @classmethod
    def of(cls, before: TokenScores, after: TokenScores) -> "TokenChanges":
        """From the scores of the reference, and of the model against it, on the same windows."""
        place = np.concatenate(after.place)
        kl, flipped = np.concatenate(after.kl), ~np.concatenate(after.agree)
        was, now = np.concatenate(before.right), np.concatenate(after.right)
        worse = np.concatenate(after.nll) - np.concatenate(before.nll)
        clusters = Clusters(_clustered(place))
        p50, p90, p99, most = (float(own) for own in np.quantile(kl, (0.5, 0.9, 0.99, 1.0), method="inverted_cdf"))
        flips_low, flips_high = clusters.share(flipped) or _NONE
        drop_low, drop_high = clusters.drop(was, now) or _NONE
        kl_low, kl_high = clusters.mean(kl) or _NONE
        worse_low, worse_high = clusters.mean(worse) or _NONE
        return cls(
            flips=float(flipped.mean()),
            flips_low=flips_low,
            flips_high=flips_high,
            flips_lost=float((was & ~now).mean()),
            flips_won=float((now & ~was).mean()),
            reference_accuracy=float(was.mean()),
            accuracy_drop=float(was.mean() - now.mean()),
            accuracy_drop_low=drop_low,
            accuracy_drop_high=drop_high,
            perplexity_ratio=perplexity(float(worse.mean())),
            perplexity_ratio_low=None if worse_low is None else perplexity(worse_low),
            perplexity_ratio_high=None if worse_high is None else perplexity(worse_high),
            kl_low=kl_low,
            kl_high=kl_high,
            kl_p50=p50,
            kl_p90=p90,
            kl_p99=p99,
            kl_max=most,
            clusters=clusters.count,
            kl_by_position=tuple(_by_position(place, kl)),
        )


def _clustered(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The cluster of each token, by its place in its window, 1, 2, …"""
    starts = place == 1
    if int(starts.sum()) < _WINDOWS:
        starts = (place - 1) % _RUN == 0
    return np.asarray(np.cumsum(starts) - 1, np.int64)


def _by_position(place: npt.NDArray[np.int64], kl: npt.NDArray[np.float64]) -> list[PositionScores]:
    found = []
    for first, end in zip(_BINS, (*_BINS[1:], int(place.max()) + 1), strict=True):
        chosen = (place >= first) & (place < end)
        if chosen.any():
            mean, error = mean_and_error([kl[chosen]])
            last, tokens = int(place[chosen].max()), int(chosen.sum())
            found.append(PositionScores(first, last, tokens, mean, error if tokens > 1 else None))
    return found
