"""Batches of feeds for a graph: from windows of token ids, or from .npz files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.inputs import Input, InputPlan, PastPair, input_plan
from qcompile.compiler.tokens import Ids
from qcompile.passes.errors import UserError

__all__ = ["Batch", "InputPlan", "PastPair", "complete", "input_plan", "npz_batches", "token_batches", "token_feeds"]

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """What one run is fed.

    rows: tokens in the batch (for .npz, its leading dimension).
    follows: the number of the batch whose present outputs are this one's past; `complete` puts them in.
    """

    feeds: Feeds
    rows: int
    follows: int | None = None


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
    return batches


def token_feeds(plan: InputPlan, ids: Ids, *, past: int = 0, empty: bool = True) -> Feeds:
    """Feeds for ids (batch, current) behind `past` tokens; with `empty`, the caches too, at zero length."""
    given = plan.require_tokens()
    batch, current = ids.shape
    feeds: Feeds = {given.name: ids.astype(given.dtype)}
    if plan.mask:
        feeds[plan.mask.name] = np.ones((batch, past + current), plan.mask.dtype)
    if plan.positions:
        row = np.arange(past, past + current)
        shape = (batch, current) if len(plan.positions.shape) == 2 else (current,)
        feeds[plan.positions.name] = np.broadcast_to(row, shape).astype(plan.positions.dtype)
    if plan.types:
        feeds[plan.types.name] = np.zeros((batch, current), plan.types.dtype)
    if empty:
        feeds |= {pair.past.name: pair.empty(batch) for pair in plan.past}
    return feeds


def complete(plan: InputPlan, feeds: Feeds, outputs: Mapping[str, Any]) -> Feeds:
    """The feeds of a following batch with the present outputs, by name, of the batch before it."""
    return feeds | {pair.past.name: outputs[pair.present] for pair in plan.past}


def npz_batches(plan: InputPlan, paths: Sequence[Path]) -> list[Batch]:
    """One batch for each .npz file, arrays by input name; more where the graph fixes a smaller leading dimension.

    Files may differ in their free dimensions. Caches may be left out (they start empty), and with the ids given also
    masks, positions and types.
    """
    batches: list[Batch] = []
    for path in paths:
        feeds = _completed(plan, _read_npz(Path(path)), Path(path))
        for part in _split(plan, feeds):
            batches.append(Batch(part, max((len(a) for a in part.values() if a.ndim), default=1)))
    return batches


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


def _read_npz(path: Path) -> Feeds:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = {name: np.asarray(loaded[name]) for name in getattr(loaded, "files", ())}
    except Exception as error:  # numpy raises ValueError, BadZipFile, zlib.error, ... on broken files
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    if isinstance(loaded, np.ndarray):
        raise UserError(f"{path} holds a single array: save a .npz with arrays by input name")
    loaded.close()
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: array {name!r} contains NaN or infinity")
    return arrays


def _completed(plan: InputPlan, arrays: Feeds, path: Path) -> Feeds:
    """The arrays checked against the graph, with what can be derived from the ids added."""
    by_name = {given.name: given for given in plan.inputs}
    unknown = [name for name in arrays if name not in by_name]
    if unknown:
        raise UserError(f"{path}: array {unknown[0]!r} is no input of the model (inputs: {', '.join(by_name)})")
    checked = {name: _checked(by_name[name], array, path) for name, array in arrays.items()}
    derived: Feeds = {}
    if plan.ids and plan.ids.name in checked and checked[plan.ids.name].ndim == 2:
        ids = checked[plan.ids.name].astype(np.int64)
        if plan.vocabulary and ids.size and not 0 <= ids.min() <= ids.max() < plan.vocabulary:
            raise UserError(f"{path}: array {plan.ids.name!r} has ids outside 0 … {plan.vocabulary - 1}")
        if not plan.past_names & set(checked):
            tokens_only = replace(plan, floats=(), unknown=())
            derived = token_feeds(tokens_only, ids)
    feeds = derived | checked
    missing = [name for name in by_name if name not in feeds]
    if missing:
        raise UserError(f"{path}: no array for input {missing[0]!r} (needed: {', '.join(by_name)})")
    return feeds


def _checked(given: Input, array: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """The array in the input's element type, if it is of the same kind and of a fitting shape."""
    where = f"{path}: array {given.name!r}"
    kinds = {"i": "integer", "u": "integer", "f": "float", "V": "float", "b": "bool"}
    wanted, got = kinds.get(given.dtype.kind, given.dtype.kind), kinds.get(array.dtype.kind, array.dtype.kind)
    if wanted != got:
        raise UserError(f"{where} is {array.dtype}, the input is {given.dtype}")
    leading = given.shape[0] if given.shape else None
    several = isinstance(leading, int) and array.ndim > 0 and len(array) > 0 and len(array) % max(leading, 1) == 0
    fits = array.ndim == len(given.shape) and all(
        not isinstance(dim, int) or dim == size or (axis == 0 and several)
        for axis, (dim, size) in enumerate(zip(given.shape, array.shape, strict=True))
    )
    if not fits:
        wanted_shape = ", ".join("?" if dim is None else str(dim) for dim in given.shape)
        raise UserError(f"{where} has shape {list(array.shape)}, the input is [{wanted_shape}]")
    return np.ascontiguousarray(array.astype(given.dtype))


def _split(plan: InputPlan, feeds: Feeds) -> list[Feeds]:
    """The feeds as batches of the graph's fixed leading dimension; as they are where it is free."""
    parts = {
        len(feeds[i.name]) // i.shape[0] for i in plan.inputs if i.shape and isinstance(i.shape[0], int) and i.shape[0]
    }
    count = max(parts, default=1)
    if count == 1:
        return [feeds]
    if parts != {count} or any(len(array) % count for array in feeds.values() if array.ndim):
        lengths = ", ".join(f"{name}: {len(array)}" for name, array in feeds.items() if array.ndim)
        raise UserError(f"the arrays' leading dimensions do not agree ({lengths})")
    return [
        dict(zip(feeds, part, strict=True)) for part in zip(*(np.split(a, count) for a in feeds.values()), strict=True)
    ]
