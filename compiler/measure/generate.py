"""Text from a decoder: with its cache if the graph has one, else by running the growing text again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.feeds import complete, token_feeds
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.data.tokens import Tokenizer
from qcompile.compiler.measure.loaded import Subject
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most likely one; top_p keeps the smallest set of tokens
    with that much probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"a temperature must be 0 or more, got {self.temperature}")
        if self.seed < 0:
            raise UserError(f"a seed must be 0 or more, got {self.seed}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, got {self.top_p}")

    def choose(self, logits: npt.NDArray[Any], generator: np.random.Generator) -> int:
        """The next token, from logits (V,)."""
        scores = logits.astype(np.float64)
        if not np.isfinite(scores).all():
            raise UserError("the model's logits contain NaN or infinity")
        if self.temperature == 0:
            return int(scores.argmax())
        scores = (scores - scores.max()) / self.temperature
        order = np.argsort(-scores, kind="stable")
        chances = np.exp(scores[order])
        chances /= chances.sum()
        kept = int(np.searchsorted(np.cumsum(chances), self.top_p)) + 1
        chances = chances[:kept] / chances[:kept].sum()
        return int(order[generator.choice(len(chances), p=chances)])


def generate_ids(
    subject: Subject, prompt: list[int], count: int, sampling: Sampling, stop: frozenset[int] = frozenset()
) -> Iterator[int]:
    """At most `count` token ids that follow the prompt, one at a time, until one of `stop` (which is not given).

    What the model cannot do is said at once, not when the first id is asked for.
    """
    plan = subject.plan
    subject.require_decoder()
    if not prompt:
        raise UserError("the prompt has no tokens: give some text with --prompt")
    if (plan.batch or 1) != 1 or (plan.sequence and (plan.past or plan.sequence < len(prompt) + count)):
        given = list(plan.ids.shape) if plan.ids else []
        raise UserError(f"the graph's input has the fixed shape {given}: it cannot take {len(prompt) + count} tokens")
    return _generate(_Cached(subject) if plan.past else _Rerun(subject), prompt, count, sampling, stop)


def _generate(
    step: "_Cached | _Rerun", prompt: list[int], count: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[int]:
    generator = np.random.default_rng(sampling.seed)
    fresh = prompt
    for _ in range(count):
        token = sampling.choose(step.logits(fresh), generator)
        if token in stop:
            return
        yield token
        fresh = [token]


def stream(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of the ids as it becomes certain: pieces of a character wait for the rest of it."""
    known: list[int] = []
    shown = ""
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(known)
    yield rest[len(shown) :] if rest.startswith(shown) else ""


class _Cached:
    """Each run takes the new tokens and the caches of the run before."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.plan: InputPlan = subject.plan
        self.names = [self.plan.require_decoder(), *(pair.present for pair in self.plan.past)]
        self.outputs: dict[str, Any] | None = None
        self.done = 0

    def logits(self, fresh: list[int]) -> npt.NDArray[Any]:
        """The scores (V,) of the token after all that was given so far."""
        ids = np.array([fresh], np.int64)
        feeds: Arrays = token_feeds(self.plan, ids, past=self.done, empty=self.outputs is None)
        if self.outputs is not None:
            feeds = complete(self.plan, feeds, self.outputs)
        self.outputs = dict(zip(self.names, run(self.subject.session, self.names, feeds), strict=True))
        self.done += len(fresh)
        scores: npt.NDArray[Any] = self.outputs[self.names[0]][0, -1]
        return scores


class _Rerun:
    """Each run takes all tokens; a graph of fixed length takes them padded behind the last one."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.ids: list[int] = []

    def logits(self, fresh: list[int]) -> npt.NDArray[Any]:
        """The scores (V,) of the token after all that was given so far."""
        self.ids += fresh
        plan = self.subject.plan
        padding = [0] * ((plan.sequence or len(self.ids)) - len(self.ids))
        feeds = token_feeds(plan, np.array([self.ids + padding], np.int64))
        scores: npt.NDArray[Any] = run(self.subject.session, [plan.require_decoder()], feeds)[0]
        last = min(len(self.ids), scores.shape[1]) - 1  # some graphs score the last token only
        row: npt.NDArray[Any] = scores[0, last]
        return row
