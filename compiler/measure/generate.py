"""Text from a decoder: with its cache if the graph has one, else by running the growing text again."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.chat import chat_template, prompt_of
from qcompile.compiler.data.decoding import Decoding
from qcompile.compiler.data.feeds import token_feeds
from qcompile.compiler.data.tokens import Tokenizer
from qcompile.compiler.measure.loaded import Subject
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run

# New tokens to the scores (V,) of the one after all that was given so far.
Scores = Callable[[list[int]], npt.NDArray[Any]]


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


@dataclass(frozen=True)
class Written:
    """A text as it comes. pieces: of it, one by one. prompt: tokens before it. chat: whether it answers by the model's
    chat template. times: in seconds, of the start and of each token so far."""

    pieces: Iterator[str]
    prompt: int
    chat: bool
    times: list[float]


def answer(
    subject: Subject, tokenizer: Tokenizer, prompt: str, sampling: Sampling, *, count: int = 64, raw: bool = False
) -> Written:
    """What a decoder says to a prompt, at most `count` tokens: by the chat template beside its tokenizer, unless `raw`.

    What cannot be done is said at once, not when the first piece is asked for.
    """
    if count < 1:
        raise UserError(f"--max-tokens must be at least 1, got {count}")
    template = None if raw else chat_template(tokenizer)
    if template is not None:
        ids = tokenizer.encode(prompt_of(tokenizer, template, prompt))
    else:
        ids = tokenizer.encode(prompt, special=True)
        while ids and ids[-1] in tokenizer.eos_ids:  # what a tokenizer closes a text with
            ids.pop()
    tokenizer.check_vocabulary(subject.plan.vocabulary, ids)
    times = [time.perf_counter()]
    found = _timed(generate_ids(subject, ids, count, sampling, tokenizer.eos_ids), times)
    return Written(stream(tokenizer, found), len(ids), template is not None, times)


def _timed(ids: Iterator[int], times: list[float]) -> Iterator[int]:
    """The ids, noting when each came."""
    for token in ids:
        times.append(time.perf_counter())
        yield token


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
    return _generate(_cached(subject) if plan.past else _Rerun(subject).logits, prompt, count, sampling, stop)


def _generate(scores: Scores, prompt: list[int], count: int, sampling: Sampling, stop: frozenset[int]) -> Iterator[int]:
    generator = np.random.default_rng(sampling.seed)
    fresh = prompt
    for _ in range(count):
        token = sampling.choose(scores(fresh), generator)
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


def _cached(subject: Subject) -> Scores:
    """Each run takes the new tokens alone, behind the caches."""
    decoding = Decoding(subject.session, subject.plan)
    return lambda fresh: decoding.logits(np.array([fresh], np.int64))[0, -1]


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
