"""What a decoder predicts on the check batches, before and after: the accuracy that a report can tell by itself."""

from collections.abc import Sequence

import numpy as np

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.metrics import TokenScores, log_softmax_rows, mean_and_error, perplexity
from qcompile.compiler.results.errors import Predictions


def predictions(
    plan: InputPlan, batches: Sequence[Batch], compiled: Sequence[Arrays], original: Sequence[Arrays]
) -> Predictions | None:
    """Scores of every token but the first of each window, with the logits of the token before it.

    None for models without logits, and where there are none for every token, or some are not finite. Decode steps,
    which follow another batch, do not count.
    """
    if plan.logits is None or plan.ids is None:
        return None
    before, after = TokenScores(), TokenScores()
    for batch, made, known in zip(batches, compiled, original, strict=True):
        if batch.follows is not None or plan.logits not in made:
            continue
        ids, name = batch.feeds[plan.ids.name].astype(np.int64), plan.logits
        x, y = known[name], made[name]
        if x.shape[:-1] != ids.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
            return None
        for row, targets in enumerate(ids[:, 1:]):
            reference = log_softmax_rows(x[row, :-1])
            before.add(x[row, :-1], targets, None)
            after.add(y[row, :-1], targets, reference)
    if not after.nll or not sum(map(len, after.nll)):
        return None
    means = [mean_and_error(values)[0] for values in (before.nll, after.nll, after.kl)]
    agreement = float(np.concatenate(after.agree).mean())
    return Predictions(sum(map(len, after.nll)), perplexity(means[0]), perplexity(means[1]), means[2], agreement)
