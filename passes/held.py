"""Judging on rows held aside: what data chose is kept only where rows agree that it was not fitted to."""

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.statistics import Statistics

# Rows below which nothing is chosen: four to fit to and four to judge on.
FEWEST = 8
# Rows that each channel needs, so that the largest value of most is known.
_EACH = 4
# Standard errors that a gain must exceed where there are fewer rows than channels.
_DEVIATIONS = 2.0
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
    guesses.
    """
    k = len(statistics.gram)
    return k if statistics.sample is None else min(k, statistics.rows // _EACH)


def confirmed(before: Array, after: Array, statistics: Statistics) -> float:
    """Loss after a choice relative to that before, on rows held aside: squared errors (h,) of each.

    It is an upper bound, so many standard errors above the mean of the rows, where rows are few against the channels
    that were fitted. As rows come to be more than channels, fits become sound and the mean is enough.
    """
    total = float(before.mean(dtype=np.float64)) if len(before) else 0.0
    if not total > 0 or len(before) < 2:
        return 1.0
    deviations = _DEVIATIONS * min(1.0, len(statistics.gram) / max(statistics.rows, 1))
    change = after.astype(np.float64) - before
    error = float(change.std(ddof=1)) / np.sqrt(len(change))
    return float((total + change.mean() + deviations * error) / total)
