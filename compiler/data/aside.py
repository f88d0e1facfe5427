"""Batches that are held aside: of arrays and pictures given as calibration data, what is used for one thing alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan
from qcompile.passes.held import FEWEST_KNOWN

Rows = npt.NDArray[np.int64]
# Batches for choices by measured errors, at most.
_CHOOSE = 4
# Rows that accuracy is told on: a share of one in so many, so many at least (of fewer no standard error is worth much)
# and at most (each is run in float and compiled); calibration keeps the rows that its passes ask for.
_SHARE, FEWEST, MOST = 8, 4, 32


def apart(plan: InputPlan, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(batches for statistics, batches for choices by measured errors) of arrays, each of which is used for one alone.

    Case 1: a quarter of the batches, one of two or three, `_CHOOSE` at most, spread evenly.
    Case 2: the last quarter of the rows of one batch alone, where it can be cut (`_cuttable`).
    Case 3: none of a batch that cannot be cut.
    """
    if len(batches) > 1:  # Case 1
        return _spread(batches, min(_CHOOSE, max(len(batches) // 4, 1)))
    if not _cuttable(plan, batches[0]) or batches[0].rows < 2:  # Case 3
        return list(batches), []
    last = max(batches[0].rows // 4, 1)
    return _without(batches, [np.arange(batches[0].rows - last, batches[0].rows)])  # Case 2


def for_accuracy(plan: InputPlan, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch], str]:
    """(batches for everything else, batches that the accuracy is told on, why there are none of these).

    About an eighth of the rows, 4 to 32, so that 32 stay: so many `smooth` asks for (`held.FEWEST_KNOWN`).
    Case 1: rows spread evenly over all, whatever batches they come in, where those that lose some can be cut.
    Case 2: whole batches, spread evenly.
    Case 3: none. Batches that follow others, through a decoder's caches, are never parted from them.
    The first row stays, and its batch: check batches are the first.
    """
    rows = sum(batch.rows for batch in batches)
    wanted = min(rows // _SHARE, MOST, rows - FEWEST_KNOWN)
    if wanted < FEWEST:
        least = FEWEST_KNOWN + FEWEST
        return (
            list(batches),
            [],
            f"{rows} row{'s are' if rows != 1 else ' is'} too few to hold some aside, {least} are not",
        )
    if any(batch.follows is not None for batch in batches):
        return list(batches), [], "its batches follow one another"
    chosen, starts = ((np.arange(wanted) + 0.5) / wanted * rows).astype(int), np.cumsum([0, *(b.rows for b in batches)])
    own = [
        chosen[(chosen >= start) & (chosen < start + b.rows)] - start for b, start in zip(batches, starts, strict=False)
    ]
    cut = [batch for batch, lost in zip(batches, own, strict=True) if 0 < len(lost) < batch.rows]
    if all(_cuttable(plan, batch) for batch in cut):  # Case 1
        return *_without(batches, own), ""
    if count := max(wanted * len(batches) // rows, int(len(batches) >= _SHARE)):  # Case 2
        parts = _spread(batches, count)
        held = sum(batch.rows for batch in parts[1])
        if FEWEST <= held <= 2 * wanted and rows - held >= FEWEST_KNOWN:
            return *parts, ""
    return list(batches), [], f"its {len(batches)} batches are too few to hold one aside, and cannot be cut"


def _spread(batches: Sequence[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """(the others, `count` of the batches, spread evenly)."""
    chosen = set(((np.arange(count) + 0.5) / count * len(batches)).astype(int).tolist())
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    for number, batch in enumerate(batches):
        parts[number in chosen].append(batch)
    return parts


def _cuttable(plan: InputPlan, batch: Batch) -> bool:
    """Whether the graph leaves the number of rows free, and all inputs have as many."""
    free = all(given.shape and not isinstance(given.shape[0], int) for given in plan.inputs)
    return free and {array.shape[:1] for array in batch.feeds.values()} == {(batch.rows,)}


def _without(batches: Sequence[Batch], rows: Sequence[Rows]) -> tuple[list[Batch], list[Batch]]:
    """(batches without some of their rows, those rows); rows: their numbers in each batch."""
    kept, taken = list[Batch](), list[Batch]()
    for batch, own in zip(batches, rows, strict=True):
        others = np.setdiff1d(np.arange(batch.rows), own)
        kept += [batch if not len(own) else _rows_of(batch, others)] if len(others) or not len(own) else []
        taken += [batch if not len(others) else _rows_of(batch, own)] if len(own) else []
    return kept, taken


def _rows_of(batch: Batch, rows: Rows) -> Batch:
    return Batch(lambda: {name: array[rows] for name, array in batch.feeds.items()}, len(rows))
