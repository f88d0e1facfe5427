"""What effects are measured on: a few windows of the calibration text, and the float model's outputs on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.feeds import Batch, InputPlan, token_feeds
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.randomness import repeatable
from qcompile.compiler.settings.bound import Bound
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run

# Few and short, since every node is one run: windows of tokens, or batches of anything else.
_WINDOWS, _TOKENS, _BATCHES = 2, 256, 4


def check_windows(plan: InputPlan, data: Data) -> tuple[list[Batch], str]:
    """(batches, what they are): cut short where tokens allow it.

    Case 1: windows or batches of the calibration data that the statistics have not seen: on those that they have,
            ranges fit too well (docs/qdq.md).
    Case 2: where none could be held aside (one batch alone, or ranges of a file), a few of the calibration batches,
            spread over them; what they are says so.
    Decode steps are left out: they need the caches of the batch before.
    """
    alone = [batch for batch in data.unseen or data.calibration if batch.follows is None]
    if not alone:
        raise UserError("sensitivity is measured on calibration data, and there is none: give --calibration")
    tokens = plan.ids is not None and not plan.floats and not plan.unknown
    count = min(_WINDOWS if tokens else _BATCHES, len(alone))
    picked = [alone[i] for i in np.unique(np.linspace(0, len(alone) - 1, count).round().astype(int))]
    cut = [_cut(plan, batch) if tokens else batch for batch in picked]
    what = f"{len(cut)} {'windows' if tokens else 'batches'}"
    size = f" of {max(batch.rows for batch in cut)} tokens" if tokens else ""
    if data.unseen:
        return cut, f"{what}{size} beside the calibration data ({data.description})"
    return cut, f"{what}{size} out of the calibration data itself, none held aside ({data.description})"


def held_windows(plan: InputPlan, data: Data) -> tuple[list[Batch], str]:
    """(batches, what they are) that a bound is to hold on: of the same data, and nothing was ranked by them."""
    alone = [batch for batch in data.held if batch.follows is None]
    tokens = plan.ids is not None and not plan.floats and not plan.unknown
    cut = [_cut(plan, batch) if tokens else batch for batch in alone]
    size = f" of {max(batch.rows for batch in cut)} tokens" if cut and tokens else ""
    return cut, f"{len(cut)} {'windows' if tokens else 'batches'}{size} held aside"


def bounding_windows(plan: InputPlan, data: Data, bound: Bound) -> tuple[list[Batch], str]:
    """As `held_windows`; UserError where nothing is held aside."""
    batches, held_on = held_windows(plan, data)
    if not batches:
        raise UserError(
            f"{bound} is judged on data that neither calibration nor the choice has seen, and none is left "
            f"({data.description}): give more with --calibration"
        )
    return batches, held_on


def _cut(plan: InputPlan, batch: Batch) -> Batch:
    """The first tokens of a batch, where everything it holds follows from the ids."""
    feeds, given = batch.feeds, plan.require_tokens()
    ids = feeds[given.name].astype(np.int64)
    derived = token_feeds(plan, ids)
    same = feeds.keys() == derived.keys() and all(np.array_equal(feeds[name], derived[name]) for name in feeds)
    if plan.sequence or not same:
        return batch
    short = ids[:, :_TOKENS]
    return Batch(token_feeds(plan, short), short.size)


def float_outputs(source: Path, plan: InputPlan, batches: Sequence[Batch], provider: str) -> list[Arrays]:
    """What the float model's file gives: its logits, or else every output that is no cache."""
    running = repeatable(source, providers=(provider,), kernels="portable")
    presents = {pair.present for pair in plan.past}
    names = [plan.logits] if plan.logits else [o.name for o in running.get_outputs() if o.name not in presents]
    return [dict(zip(names, run(running, names, batch.feeds), strict=True)) for batch in batches]
