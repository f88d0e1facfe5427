"""Batches of feeds for a graph: from windows of token ids, or from files of arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.compiler.data.array_files import array_sets
from qcompile.compiler.data.inputs import InputPlan, PastPair, input_plan
from qcompile.compiler.data.npz import (
    Arrays,
    check_rows,
    conversions,
    has_rows,
    leading,
    read_arrays,
    split,
    stored_arrays,
)
from qcompile.compiler.data.tokens import Ids
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.passes.errors import UserError

__all__ = [
    "Batch",
    "InputPlan",
    "PastPair",
    "array_conversions",
    "complete",
    "completed",
    "input_plan",
    "kept",
    "npz_batches",
    "token_batches",
    "token_feeds",
]

# Bytes of files of arrays that stay in memory; a compile reads each file a dozen times.
_HELD = 8 << 20


@dataclass(frozen=True)
class Batch:
    """What one run is fed.

    given: its arrays by input name, or a function that reads them.
    rows: tokens in the batch (for arrays, their leading dimension).
    follows: the number of the batch whose present outputs are this one's past; `complete` puts them in.
    """

    given: Arrays | Callable[[], Arrays]
    rows: int
    follows: int | None = None

    @property
    def feeds(self) -> Arrays:
        """The arrays by input name, read anew where they are not in memory."""
        return self.given() if callable(self.given) else self.given


def token_batches(plan: InputPlan, windows: Sequence[Ids], *, decode_step: bool = False) -> list[Batch]:
    """One batch for each window (with a fixed batch dimension: for each full stack of windows).

    decode_step: a model with caches gets the window without its last token, from an empty past, then a second batch
    with the last token, that follows. A cache graph of fixed length takes its windows in pieces of that length.
    """
    plan.require_tokens()
    batches: list[Batch] = []
    for stack in _stacks(plan, windows):
        done, previous = 0, None
        for piece in _pieces(plan, stack, decode_step=decode_step):
            feeds = token_feeds(plan, piece, past=done, empty=previous is None)
            batches.append(Batch(feeds, piece.size, previous))
            done, previous = done + piece.shape[1], len(batches) - 1
    if not batches:
        raise UserError(
            f"the model takes {plan.sequence} tokens at a time, got a window of {len(windows[0])}: "
            f"use --context {plan.sequence} or more, and a longer text"
        )
    return batches


def beginning(plan: InputPlan, batch: Batch, tokens: int) -> Batch:
    """A batch of arrays with so many tokens of each of its texts at most; as it is where they cannot be cut there.

    Case 1: the graph fixes their number, the batch continues another one's caches or has some of its own, or there are
            inputs that do not follow from ids.
    Case 2: padding stands before the texts, so that nothing of them might be left.
    """
    if plan.ids is None or plan.sequence or batch.follows is not None:  # Case 1
        return batch
    feeds, roles = batch.feeds, (plan.ids, plan.mask, plan.positions, plan.types)
    cut = [role.name for role in roles if role is not None and role.name in feeds]
    others = [array for name, array in feeds.items() if name not in (*cut, *(own.name for own in plan.unread))]
    same = {feeds[name].shape[-1:] for name in cut} == {feeds[plan.ids.name].shape[-1:]}
    if any(array.size for array in others) or not same:
        return batch
    if plan.mask is not None and plan.mask.name in feeds and not feeds[plan.mask.name][..., :1].all():  # Case 2
        return batch
    return Batch(feeds | {name: feeds[name][..., :tokens] for name in cut}, batch.rows)


def token_feeds(plan: InputPlan, ids: Ids, *, past: int = 0, empty: bool = True) -> Arrays:
    """Feeds for ids (batch, current) behind `past` tokens; with `empty`, the caches too, at zero length."""
    given = plan.require_tokens()
    batch, current = ids.shape
    feeds: Arrays = {**plan.fillers(), given.name: ids.astype(given.dtype)}
    if plan.mask:
        feeds[plan.mask.name] = np.ones((batch, past + current), plan.mask.dtype)
    if plan.positions:
        row = np.arange(past, past + current)
        shape = (batch, current) if len(plan.positions.shape) == 2 else (current,)
        feeds[plan.positions.name] = np.broadcast_to(row, shape).astype(plan.positions.dtype)
    if plan.types:
        feeds[plan.types.name] = np.zeros((batch, current), plan.types.dtype)
    if len(given.shape) == 1:  # one row without a batch axis: what has the ids' rank loses it, too
        for role in (given, plan.mask, plan.types):
            if role is not None:
                feeds[role.name] = feeds[role.name].reshape(-1)
    if empty:
        feeds |= {pair.past.name: pair.empty(batch) for pair in plan.past}
    return feeds


def complete(plan: InputPlan, feeds: Arrays, outputs: Mapping[str, Any]) -> Arrays:
    """The feeds of a following batch with the present outputs, by name, of the batch before it."""
    return feeds | {pair.past.name: outputs[pair.present] for pair in plan.past}


def npz_batches(plan: InputPlan, paths: Sequence[Path]) -> list[Batch]:
    """One batch for each .npz file or set of .npy files; more where the graph fixes a smaller leading dimension.

    Files may differ in their free dimensions. Caches may be left out (they start empty), and with the ids given also
    masks, positions and types. Every file is checked here. What the first ones hold stays in memory, up to `_HELD`
    bytes; the others are read again whenever their batch is run; the parts of a file of several batches are kept in a
    Spill.
    """
    batches: list[Batch] = []
    parts, rows, left = Spill(), False, float(_HELD)
    for group in array_sets(plan, paths):
        feeds = _from_files(plan, group)
        rows = rows or has_rows(plan, feeds)
        several = split(plan, feeds)
        if len(several) > 1:
            batches += [Batch(kept(parts, part), leading(part)) for part in several]
        else:
            size = sum(math.inf if array.dtype.hasobject else array.nbytes for array in feeds.values())
            left -= size if (held := size <= left) else 0
            batches.append(Batch(feeds if held else partial(_from_files, plan, group), leading(feeds)))
    check_rows(rows, str(paths[0]))
    return batches


def array_conversions(plan: InputPlan, paths: Sequence[Path]) -> list[str]:
    """What is converted in files of arrays, each told once."""
    told = (conversions(plan, stored_arrays(plan, group)) for group in array_sets(plan, paths))
    return list(dict.fromkeys(remark for remarks in told for remark in remarks))


def completed(plan: InputPlan, arrays: Arrays, source: str) -> Arrays:
    """Arrays that were checked, with what can be derived from the ids, empty caches, and what no node reads added."""
    derived = dict(plan.fillers())
    ids = arrays.get(plan.ids.name) if plan.ids else None
    if plan.ids and ids is not None:
        if plan.vocabulary and ids.size and not -plan.vocabulary <= ids.min() <= ids.max() < plan.vocabulary:
            raise UserError(f"{source}: array {plan.ids.name!r} has ids outside 0 … {plan.vocabulary - 1}")
        if not plan.past_names & set(arrays):
            rows = ids.astype(np.int64)
            tokens_only = replace(plan, floats=(), unknown=())
            derived |= token_feeds(tokens_only, rows if rows.ndim == 2 else rows[None])
    feeds = derived | arrays
    missing = [given.name for given in plan.inputs if given.name not in feeds]
    if missing:
        needed = ", ".join(given.name for given in plan.required)
        raise UserError(f"{source}: no array for input {missing[0]!r} (needed: {needed})")
    return feeds


def kept(spill: Spill, feeds: Arrays) -> Callable[[], Arrays]:
    """The feeds put aside; what is returned gives them back."""
    numbers = {name: spill.append(array) for name, array in feeds.items()}
    return lambda: {name: spill[number] for name, number in numbers.items()}


def _stacks(plan: InputPlan, windows: Sequence[Ids]) -> list[Ids]:
    """Windows as ids (batch, length); what does not fill a fixed batch is left out."""
    size = plan.batch or 1
    for window in windows:
        if plan.sequence and not plan.past and len(window) != plan.sequence:
            raise UserError(
                f"the model takes exactly {plan.sequence} tokens, got a window of {len(window)}: "
                f"use --context {plan.sequence} and a longer text"
            )
    groups = [windows[start : start + size] for start in range(0, len(windows), size)]
    full = [group for group in groups if len(group) == size and len({len(w) for w in group}) == 1]
    if not full:
        raise UserError(f"the model takes exactly {size} windows of one length at a time, got {len(windows)}")
    return [np.stack(group) for group in full]


def _pieces(plan: InputPlan, ids: Ids, *, decode_step: bool) -> list[Ids]:
    if not plan.past:
        return [ids]
    length = ids.shape[1]
    if plan.sequence:
        return [ids[:, i : i + plan.sequence] for i in range(0, length - plan.sequence + 1, plan.sequence)]
    return [ids[:, :-1], ids[:, -1:]] if decode_step and length > 1 else [ids]


def _from_files(plan: InputPlan, paths: Sequence[Path]) -> Arrays:
    """The feeds of files that together fill the inputs; UserError where they do not fit."""
    return completed(plan, read_arrays(plan, paths), " and ".join(map(str, paths[:2])))
