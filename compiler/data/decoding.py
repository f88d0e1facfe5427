"""A decoder with caches, fed with tokens and nothing else."""

from typing import Any

import numpy.typing as npt

from qcompile.compiler.data.feeds import token_feeds
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.tokens import Ids
from qcompile.runtime.caches import Decoder


class Decoding:
    """A batch of sequences that grow, none of them padded."""

    def __init__(self, session: Any, plan: InputPlan) -> None:
        self.plan, self.done = plan, 0
        self.decoder = Decoder(session, plan.caches, [plan.require_decoder()])

    def logits(self, ids: Ids) -> npt.NDArray[Any]:
        """Scores (batch, rows, V) behind each of the next tokens (batch, rows); some graphs give the last row alone."""
        feeds = token_feeds(self.plan, ids, past=self.done, empty=not self.done)
        self.done += ids.shape[1]
        (scores,) = self.decoder.run(feeds)
        return scores
