"""What a decoder predicts before and after: the accuracy that a report can tell by itself."""

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
    """The scores of all batches."""
    scored = Scored(plan)
    for batch, made, known in zip(batches, compiled, original, strict=True):
        scored.add(batch, made, known)
    return scored.predictions


class Scored:
    """Scores of every token but the first of each window, with the logits of the token before it.

    None for models without logits, and where there are none for every token, or some are not finite. Decode steps,
    which follow another batch, do not count.
    """

    def __init__(self, plan: InputPlan) -> None:
        self.plan, self._before, self._after = plan, TokenScores(), TokenScores()
        self._usable = plan.logits is not None and plan.ids is not None

    def add(self, batch: Batch, made: Arrays, known: Arrays) -> None:
        """The outputs of a batch, compiled and float."""
        plan = self.plan
        if not self._usable or plan.logits is None or plan.ids is None:
            return
        if batch.follows is not None or plan.logits not in made:
            return
        ids, x, y = batch.feeds[plan.ids.name].astype(np.int64), known[plan.logits], made[plan.logits]
        if x.shape[:-1] != ids.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
            self._usable = False
            return
        for row, targets in enumerate(ids[:, 1:]):
            reference = log_softmax_rows(x[row, :-1])
            self._before.add(x[row, :-1], targets, None)
            self._after.add(y[row, :-1], targets, reference)

    @property
    def predictions(self) -> Predictions | None:
        """Those of all batches so far."""
        before, after = self._before, self._after
        return _told(before, after) if self._usable and any(len(part) for part in after.nll) else None


def _told(before: TokenScores, after: TokenScores) -> Predictions:
    means = [mean_and_error(values)[0] for values in (before.nll, after.nll)]
    kl, error = mean_and_error(after.kl)
    agreement, tokens = float(np.concatenate(after.agree).mean()), sum(map(len, after.nll))
    ends = perplexity(means[0]), perplexity(means[1])
    return Predictions(tokens, *ends, kl, agreement, error if np.isfinite(error) else None)
