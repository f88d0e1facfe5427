"""Where calibration data comes from, in this order: the user, the bundled text, the model itself."""

import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.compiler.feeds import Batch, InputPlan, kept, npz_batches, token_batches
from qcompile.compiler.npz import checked, leading
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.sampling import sample_windows
from qcompile.compiler.spill import Spill
from qcompile.compiler.tokens import Ids, Tokenizer, find_tokenizer, load_tokenizer
from qcompile.models.text import calibration_text, read_texts
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

_log = logging.getLogger(__name__)

# Words for --calibration without files.
SELF, NORMS = "self", "norms"
# Batches that the finished model is checked on: few and short, since every output of theirs is kept.
_CHECKS, _CHECK_TOKENS = 2, 48
# Windows for choices by measured errors, which the statistics have not seen.
_UNSEEN = 2
# Windows of a model with caches that are followed by a decode step: each step is one more run, for one token.
_DECODED = 4
# An encoder sees windows of so many lengths, each half of the one before.
_LENGTHS = 5


@dataclass(frozen=True)
class Data:
    """Batches for statistics, batches to check the result on, and a sentence that says where both come from.

    real: the checks are what the model may meet, not random numbers. unseen: windows of the same text beside those of
    the statistics, where a recipe chooses by its own errors. data_free: nothing came from the user or the bundle.
    guess: passes have their statistics from the scales of norms (`proxies`), not from a run.
    """

    calibration: list[Batch]
    checks: list[Batch]
    description: str
    real: bool = True
    unseen: Sequence[Batch] = ()
    data_free: bool = False
    guess: bool = False


def gather(
    plan: InputPlan, model: Path, recipe: Recipe, files: Sequence[str], tokenizer: Path | None, *, needed: bool
) -> Data:
    """The calibration data of a model; with `needed` False only what the checks take.

    files: texts, .npz files, or module:function; or one word that is no file: "self" for tokens that the model samples,
    "norms" for no data at all.
    """
    if len(files) == 1 and files[0] in (SELF, NORMS) and not Path(files[0]).exists():
        return _data_free(plan, model, recipe, files[0], needed=needed)
    arrays = [Path(file) for file in files if file.endswith(".npz")]
    functions = [file for file in files if ":" in file and not Path(file).exists()]
    texts = [Path(file) for file in files if Path(file) not in arrays and file not in functions]
    if sum(map(bool, (arrays, functions, texts))) > 1:
        raise UserError("--calibration takes text files, .npz files or one module:function, not a mixture")
    if arrays:
        batches = npz_batches(plan, arrays)
        return Data(batches if needed else [], batches[:_CHECKS], f"{len(batches)} batches of {_names(arrays)}")
    if functions:
        batches = _called(plan, functions[0])
        return Data(batches if needed else [], batches[:_CHECKS], f"{len(batches)} batches of {functions[0]}")
    if plan.floats or plan.unknown or plan.ids is None:
        if needed:
            plan.require_tokens()
        return _random(plan)
    found = load_tokenizer(tokenizer) if tokenizer is not None else _beside(model)
    if found is None and texts:
        raise UserError(
            f"--calibration {texts[0]} is text, but no tokenizer.json lies beside {model}: give --tokenizer"
        )
    if found is not None:
        return _from_text(plan, recipe, found, texts, needed=needed)
    return _data_free(plan, model, recipe, SELF, needed=needed, why=" (no tokenizer beside it)")


def spread(ids: Sequence[int], context: int, count: int) -> list[Ids]:
    """Up to `count` windows of `context` tokens, spread evenly over the text and disjoint."""
    flat = np.asarray(ids, np.int64)
    whole = len(flat) // context
    if whole <= 1:
        return [flat[:context]] if len(flat) > 1 else []
    chosen = np.unique(np.linspace(0, whole - 1, min(count, whole)).round().astype(int))
    return [flat[i * context : (i + 1) * context] for i in chosen]


def unseen(ids: Sequence[int], context: int, count: int, wanted: int) -> list[Ids]:
    """Up to `wanted` windows of `context` tokens, spread evenly over those that `spread` of `count` leaves out."""
    flat = np.asarray(ids, np.int64)
    whole = len(flat) // context
    if whole <= count:
        return []
    left = np.setdiff1d(np.arange(whole), np.linspace(0, whole - 1, count).round().astype(int))
    chosen = np.unique(((np.arange(wanted) + 0.5) / wanted * len(left)).astype(int))
    return [flat[i * context : (i + 1) * context] for i in left[chosen]]


def _from_text(plan: InputPlan, recipe: Recipe, tokenizer: Tokenizer, texts: Sequence[Path], *, needed: bool) -> Data:
    documents = read_texts(texts) if texts else [calibration_text()]
    source = _names(texts) if texts else "the bundled text (speeches and a novel, English)"
    ids = [token for document in documents for token in tokenizer.encode(document)]
    tokenizer.check_vocabulary(plan.vocabulary, ids)
    context = plan.sequence or recipe.context
    windows = spread(ids, context, recipe.samples)
    if not windows:
        raise UserError(f"the calibration text has {len(ids)} tokens: give at least two")
    if needed and len(windows) < recipe.samples:
        _log.warning(
            "the calibration text holds %d windows of %d tokens, not %d", len(windows), context, recipe.samples
        )
    others = unseen(ids, context, recipe.samples, _UNSEEN * (plan.batch or 1)) if recipe.mixed else []
    length = f"{len(windows[0])}"
    if plan.logits is None and not plan.past and not plan.sequence and plan.batch in (None, 1):
        windows, others = _as_texts(tokenizer, windows), _as_texts(tokenizer, others)
        length = f"{min(map(len, windows))} to {max(map(len, windows))}"
    calibration = _batches(plan, windows) if needed else []
    described = f"{len(windows)} windows of {length} tokens from {source}" if needed else source
    held = token_batches(plan, others) if len(others) >= (plan.batch or 1) else []
    return Data(calibration, _checks(plan, windows), described, unseen=held)


def _as_texts(tokenizer: Tokenizer, windows: Sequence[Ids]) -> list[Ids]:
    """Windows as an encoder meets texts: of many lengths, within special tokens, whose activations stand out."""
    before, behind = tokenizer.around()
    texts = []
    for i, window in enumerate(windows):
        room = max((len(window) >> (i % _LENGTHS)) - len(before) - len(behind), 1)
        texts.append(np.array([*before, *window[:room], *behind], np.int64))
    return texts


def _checks(plan: InputPlan, windows: Sequence[Ids]) -> list[Batch]:
    """The first windows, cut short where the graph allows it."""
    chosen = windows[: _CHECKS * (plan.batch or 1)]
    short = [window if plan.sequence else window[:_CHECK_TOKENS] for window in chosen]
    return token_batches(plan, short, decode_step=bool(plan.past))


def _batches(plan: InputPlan, windows: Sequence[Ids]) -> list[Batch]:
    """Prefill of every window; with caches, a decode step behind the first few."""
    if not plan.past or plan.sequence or plan.batch not in (None, 1):
        return token_batches(plan, windows, decode_step=bool(plan.past))
    decoded, rest = windows[:_DECODED], windows[_DECODED:]
    return token_batches(plan, decoded, decode_step=True) + (token_batches(plan, rest) if rest else [])


def _data_free(plan: InputPlan, model: Path, recipe: Recipe, kind: str, *, needed: bool, why: str = "") -> Data:
    """Case 1: nothing is needed: random checks. Case 2: "norms". Case 3: tokens sampled from the model.

    Checks are sampled, too, but by another seed, so that statistics have not seen them.
    """
    if not needed:
        return _random(plan)
    if plan.logits is None:
        if kind == NORMS:
            return replace(_random(plan), description="none: scales of norms stand in", data_free=True, guess=True)
        raise UserError(
            "no tokenizer lies beside the model, and it is no decoder to sample text from: give --tokenizer, or "
            "--calibration norms for passes that need no more"
        )
    running = session(model, providers=(recipe.provider,), kernels="portable")
    count = _CHECKS * (plan.batch or 1)
    checks = _checks(plan, sample_windows(running, plan, count, _CHECK_TOKENS, recipe.seed + 1))
    if kind == NORMS:
        return Data([], checks, "none: scales of norms stand in", data_free=True, guess=True)
    windows = sample_windows(running, plan, recipe.samples, recipe.context, recipe.seed)
    described = f"{len(windows)} windows of {len(windows[0])} tokens sampled from the model itself{why}"
    return Data(_batches(plan, windows), checks, described, data_free=True)


def _random(plan: InputPlan) -> Data:
    """Checks on random inputs, for a compile that needs no data."""
    rng = np.random.default_rng(0)
    if plan.ids is not None and not plan.floats and not plan.unknown:
        length = plan.sequence or _CHECK_TOKENS
        count = _CHECKS * (plan.batch or 1)
        windows = [rng.integers(plan.vocabulary or 2, size=length) for _ in range(count)]
        return Data([], token_batches(plan, windows, decode_step=bool(plan.past)), "random tokens (checks only)", False)
    feeds = {}
    for given in plan.inputs:
        shape = [
            dim if isinstance(dim, int) and dim > 0 else _free(i, len(given.shape)) for i, dim in enumerate(given.shape)
        ]
        draw = rng.normal(size=shape) if given.is_float else rng.integers(0, 2, size=shape)
        feeds[given.name] = np.asarray(draw).astype(given.dtype)
    return Data([], [Batch(feeds, 1)], "random normal inputs (checks only; give .npz files for real ones)", False)


def _free(axis: int, rank: int) -> int:
    """A size for a free dimension: one batch, images large enough for every stride, short sequences."""
    if axis == 0:
        return 1
    return 64 if rank == 4 else 16


def _beside(model: Path) -> Tokenizer | None:
    path = find_tokenizer(model)
    return load_tokenizer(path) if path is not None else None


def _called(plan: InputPlan, reference: str) -> list[Batch]:
    """Batches of what module:function gives, an iterable of dicts from input name to array, each put aside at once."""
    function, spill = _function(reference), Spill()
    try:
        batches = [_given(plan, feeds, spill) for feeds in function()]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--calibration {reference} failed: {type(error).__name__}: {error}") from error
    if not batches:
        raise UserError(f"{reference} gave no batches")
    return batches


def _function(reference: str) -> Any:
    module, _, name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look in the current folder by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--calibration {reference}: {error}") from error


def _given(plan: InputPlan, feeds: Any, spill: Spill) -> Batch:
    names = {given.name for given in plan.inputs}
    if not isinstance(feeds, dict) or set(feeds) - names or names - set(feeds) - plan.past_names:
        raise UserError(f"a calibration batch must be a dict with an array for each of {', '.join(sorted(names))}")
    by_name = {given.name: given for given in plan.inputs}
    # Copies: a function may fill the same array again.
    arrays = {name: checked(by_name[name], np.array(a), "a calibration batch") for name, a in feeds.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"a calibration batch holds NaN or infinity in {name!r}")
    return Batch(kept(spill, arrays), leading(arrays))


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
