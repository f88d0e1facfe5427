"""What is odd about calibration data: few samples, constant inputs, batches that are all the same."""

from collections.abc import Iterator, Sequence

import numpy as np

from qcompile.compiler.console.visible import visible
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan

# Batches that are looked at; rows below which ranges of activations are a guess.
_LOOKED_AT, _FEW = 16, 8


def oddities(plan: InputPlan, batches: Sequence[Batch], *, ranges: bool) -> Iterator[str]:
    """In words; the first batches stand for all. ranges: activations get fixed ranges, which few rows do not tell.

    Inputs that are no data (masks, positions, caches, those that are empty) are constant by nature.
    """
    alone = [batch for batch in batches if batch.follows is None]
    if not alone:
        return
    rows = sum(batch.rows for batch in alone)
    if ranges and rows < _FEW:
        count = f"{rows} row{'s' * (rows != 1)}"
        yield f"the calibration set has {count}: ranges of activations are a guess; give {_FEW} or more"
    looked = [batch.feeds for batch in alone[:_LOOKED_AT]]
    watched = [own for own in plan.inputs if own.is_float or own == plan.ids]
    arrays = {own.name: [feeds[own.name] for feeds in looked if own.name in feeds] for own in watched}
    for name, parts in arrays.items():
        sizes = [part for part in parts if part.size]
        if not sizes or sum(part.size for part in sizes) < 2 or sizes[0].dtype.kind not in "fiu":
            continue
        first = sizes[0].reshape(-1)[0]
        if all((part == first).all() for part in sizes):
            told = "all zero" if first == 0 else f"{float(first):g} throughout"
            yield f"input {visible(name)} is {told} in the calibration set: is it read as it should be?"
    kept = [parts for parts in arrays.values() if len(parts) == len(looked) > 1]
    if kept and all(np.array_equal(part, parts[0]) for parts in kept for part in parts[1:]):
        yield f"the calibration set has {len(alone)} equal batches: one tells as much"
