"""Calibration text for a decoder without a tokenizer: tokens sampled from the model itself."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.decoding import Decoding
from qcompile.compiler.data.feeds import token_feeds
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.tokens import Ids
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run

_log = logging.getLogger(__name__)

# Sequences sampled at a time: their logits are (8, length, vocabulary) float32.
_BATCH = 8
# Without a cache every new token reruns its sequence, so sequences are short and a window holds several of them.
_PIECE = 32
# A graph of fixed length runs whole windows only: every run resamples all tokens, given those of the run before.
_ROUNDS = 8


def sample_windows(
    session: Any,
    plan: InputPlan,
    count: int,
    context: int,
    seed: int,
    vocabulary: int | None = None,
    *,
    budget: int | None = None,
) -> list[Ids]:
    """Windows of `context` tokens drawn from the model at temperature 1, each sequence begun by a random token.

    At most `count`, and no more than `budget` tokens (but one window) in all, because every token costs a run:
    4096 by default with a cache, 2048 without.
    """
    logits = plan.require_decoder()
    vocabulary = vocabulary or plan.vocabulary
    if not vocabulary:
        raise UserError("the size of the model's vocabulary is unknown: give --calibration or --tokenizer")
    if plan.past and plan.sequence:
        raise UserError("the model takes a fixed number of tokens beside its cache: give --calibration or --tokenizer")
    generator = np.random.default_rng(seed)
    context = plan.sequence or context
    budget = budget or (4096 if plan.past else 2048)
    wanted = max(1, min(count, budget // context))
    if wanted < count:
        _log.info("sampling %d windows of %d tokens instead of %d, to keep the time bounded", wanted, context, count)
    length = context if plan.past or plan.sequence else min(context, _PIECE)
    tokens: list[Ids] = []
    while sum(rows.size for rows in tokens) < wanted * context:
        missing = -(-(wanted * context - sum(rows.size for rows in tokens)) // length)
        start = generator.integers(vocabulary, size=(plan.batch or min(_BATCH, missing), 1))
        if plan.past:
            tokens.append(_with_cache(session, plan, start, length, generator))
        elif plan.sequence:
            tokens.append(_resampled(session, plan, logits, start, generator))
        else:
            tokens.append(_growing(session, plan, logits, start, length, generator))
    flat = np.concatenate([rows.reshape(-1) for rows in tokens])[: wanted * context]
    return list(flat.reshape(wanted, context))


def draw(logits: npt.NDArray[Any], generator: np.random.Generator, temperature: float = 1.0) -> Ids:
    """One id for each row of logits (…, V), by the Gumbel-max trick, int64 (…,)."""
    if not np.isfinite(logits).all():
        raise UserError("the model's logits contain NaN or infinity")
    noise = generator.gumbel(size=logits.shape).astype(np.float32)
    return np.asarray(np.argmax(logits.astype(np.float32) / temperature + noise, axis=-1), np.int64)


def _with_cache(session: Any, plan: InputPlan, start: Ids, length: int, generator: np.random.Generator) -> Ids:
    decoding, columns = Decoding(session, plan), [start]
    for _ in range(length - 1):
        columns.append(draw(decoding.logits(columns[-1])[:, -1:], generator))
    return np.concatenate(columns, axis=1)


def _growing(
    session: Any, plan: InputPlan, logits: str, start: Ids, length: int, generator: np.random.Generator
) -> Ids:
    ids = start
    while ids.shape[1] < length:
        (scores,) = run(session, [logits], token_feeds(plan, ids))
        ids = np.concatenate([ids, draw(scores[:, -1:], generator)], axis=1)
    return ids


def _resampled(session: Any, plan: InputPlan, logits: str, start: Ids, generator: np.random.Generator) -> Ids:
    length = plan.sequence or 1
    ids = np.repeat(start, length, axis=1)
    for _ in range(_ROUNDS):
        (scores,) = run(session, [logits], token_feeds(plan, ids))
        ids = np.concatenate([start, draw(scores[:, :-1], generator)], axis=1)
    return ids
