"""What a decoder predicts on the check batches, before and after: the accuracy that a report can tell by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.compiler.feeds import Batch
from qcompile.compiler.inputs import InputPlan
from qcompile.compiler.metrics import TokenScores, log_softmax_rows, mean_and_error, perplexity
from qcompile.compiler.stream import Arrays


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions on the check batches: few tokens, so no more than a first look; `qcompile eval` has more.

    tokens: scored ones. before, after: perplexity of the float and of the compiled model. kl: KL(float ‖ compiled),
    nats a token. agreement: share of equal most likely tokens.
    """

    tokens: int
    before: float
    after: float
    kl: float
    agreement: float

    def told(self) -> str:
        """In a line."""
        return (
            f"KL {self.kl:.3g} nats a token, perplexity {self.before:.4g} → {self.after:.4g}, same most likely token "
            f"{self.agreement:.0%}, on {self.tokens} check tokens"
        )


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
