"""Judging on rows held aside: what data chose is kept only where rows agree that it was not fitted to."""

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.statistics import Numbers, Statistics

# Rows below which nothing is chosen: four to fit to and four to judge on.
FEWEST = 8
# Rows that each channel needs, so that the largest value of most is known.
_EACH = 4
# Rows below which no channel's largest value is taken as known.
FEWEST_KNOWN = _EACH * FEWEST
# Standard errors that a gain must exceed where there are fewer rows than channels.
_DEVIATIONS = 2.0
# Rows of more than so many times the median norm count as if they had that: a decoder's first token carries nearly all
# of the output energy of some products, and what is best for it alone is not for the others.
_LOUDEST = 4.0
NOT_CONFIRMED = "rows held aside do not confirm a gain"


def too_few(statistics: Statistics, *, channels: bool = False) -> str:
    """Why a choice by these statistics cannot be made or judged, or an empty string; guesses are taken as they are.

    channels: it takes the largest value of each channel as known, as what is to be rounded to a fixed grid needs. Of K
    channels K / (rows + 1) go beyond that in every row to come, so rows must be more than channels.
    """
    if statistics.sample is None:
        return ""
    rows, k = statistics.rows, len(statistics.gram)
    if len(statistics.sample) < FEWEST:
        return f"seen on {rows} rows, too few to hold any aside and judge a choice on (at least {FEWEST})"
    if channels and rows < _EACH * k:
        return f"seen on {rows} rows, too few to know how far each of {k} channels goes (at least {_EACH * k} rows)"
    return ""


def known_channels(statistics: Statistics) -> int:
    """Of how many channels the largest value counts as known: so many may be made even before a fixed grid; all (K) of
    guesses, none below `FEWEST_KNOWN` rows.

    Every 17th row to come goes beyond what 16 rows showed of a channel: tiny decoders lost up to 3.4 dB on 256 texts by
    four channels that 16 tokens were to tell of, and gained in each of 16 draws of 32 and 48.
    """
    k = len(statistics.gram)
    if statistics.sample is None:
        return k
    return min(k, statistics.rows // _EACH) if statistics.rows >= FEWEST_KNOWN else 0


def confirmed(before: Array, after: Array, statistics: Statistics) -> float:
    """Loss after a choice relative to that before, on the rows that `statistics.split` holds aside: squared errors (h,)
    of each.

    It is an upper bound, so many standard errors above the mean of the rows, where rows are few against the channels
    that were fitted. As rows come to be more than channels, fits become sound and the mean is enough. What rows of one
    text or picture have in common makes the error `alike` times as large, and all rows count as so many less: the least
    power of `alike` (of 0, 0.25, 0.5, 1 and 2) by which fits to few seeded texts do no harm on others (test_held.py),
    compared on seeded decoders and on halves of the calibration text (docs/architecture.md).
    """
    total = float(before.mean(dtype=np.float64)) if len(before) else 0.0
    if not total > 0 or len(before) < 2:
        return 1.0
    more = alike(before, after, statistics.held_groups)
    deviations = _DEVIATIONS * min(1.0, more * len(statistics.gram) / max(statistics.rows, 1))
    change = after.astype(np.float64) - before
    error = more * float(change.std(ddof=1)) / np.sqrt(len(change))
    return float((total + change.mean() + deviations * error) / total)


def alike(before: Array, after: Array, groups: Numbers | None) -> float:
    """How many times as large the standard error of after / before, of rows (h,), is by their groups (h,), which alone
    are independent of each other, as it would be by single rows: 1 at least, the root of the design effect.

    Of the ratio, so that a text that is louder does not count against a choice that gains there as elsewhere.
    """
    if groups is None:
        return 1.0
    residuals = after.astype(np.float64) - after.sum(dtype=np.float64) / before.sum(dtype=np.float64) * before
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], residuals)
    if len(sums) < 2 or not residuals.any():
        return 1.0
    ratio = np.square(sums).sum() / np.square(residuals).sum()
    share = len(sums) / (len(sums) - 1) * (len(residuals) - 1) / len(residuals)
    return max(1.0, float(np.sqrt(share * ratio)))


def row_weights(rows: Array, statistics: Statistics) -> Array:
    """What the squared error of each of the rows (h, K) counts, (h,): those of extreme norm as if they had no more than
    `_LOUDEST` times the median of the sample.
    """
    assert statistics.sample is not None
    most = _LOUDEST * np.median(np.linalg.norm(statistics.sample, axis=1))
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.square(np.minimum(1, most / norms)), np.float32)
