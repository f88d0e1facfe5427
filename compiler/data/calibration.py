"""Where calibration data comes from, in this order: the user, the bundled text, the model itself."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.compiler.data import aside
from qcompile.compiler.data.calibration_files import GENERAL, NORMS, SELF, Files
from qcompile.compiler.data.feeds import Batch, InputPlan, array_conversions, beginning, npz_batches, token_batches
from qcompile.compiler.data.images import SUFFIXES as IMAGES
from qcompile.compiler.data.images import Pictures, picture_input
from qcompile.compiler.data.inputs import Dim
from qcompile.compiler.data.picture_batches import left_out as pictures_left_out
from qcompile.compiler.data.picture_batches import picture_batches
from qcompile.compiler.data.readers import Reader, is_reference, label_of, read_batches
from qcompile.compiler.data.sampling import sample_windows
from qcompile.compiler.data.tokens import Ids, Tokenizer, begun, find_tokenizer, load_tokenizer
from qcompile.compiler.files.load import data_files
from qcompile.models.text import calibration_text, read_texts
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

_log = logging.getLogger(__name__)

# Batches that the finished model is checked on: few and short, since every output of theirs is kept.
_CHECKS, _CHECK_TOKENS = 2, 48
# The same where a sample is verified on random tokens: each row is a product more by every weight, and tells little.
_FEW_CHECKS, _FEW_TOKENS = 1, 16
# Bytes of models up to which the session that samples tokens has float weights in the layout of its kernels.
_PREPACKED = 512 << 20
# Windows for choices by measured errors, which the statistics have not seen.
_UNSEEN = 2
# Batches that the accuracy is told on, and tokens of each window among them.
_JUDGED, _JUDGED_TOKENS = 2, 128
# Windows held aside, of statistics and of a choice, and judged: what a mixture has beside those that are asked for.
_BESIDE = 2 * _UNSEEN + _JUDGED
# Windows of a text that the user gives for it.
_GIVEN = 8
# Windows of a model with caches that are followed by a decode step: each step is one more run, for one token.
_DECODED = 4
# An encoder sees windows of so many lengths, each half of the one before.
_LENGTHS = 5


@dataclass(frozen=True)
class Data:
    """Batches for statistics, batches to check the result on, and a sentence that says where both come from.

    real: the checks are what the model may meet, not random numbers. unseen: batches of the same data beside those of
    the statistics, for choices by measured errors. held: more of them, that such a choice is judged by. evaluation:
    batches that nothing is fitted to or chosen by, for the accuracy that is told, evaluated_on: what they are; where
    there are none, the checks, and none_aside says why. data_free: nothing came from the user or the bundle.
    bundled: all or half of the text is what comes with qcompile. verified: whether checks are run, or only looked at.
    own: how many batches of `calibration`, the first ones, the model sampled itself; random tokens come behind them.
    guess: passes have their statistics from the scales of norms (`proxies`), not from a run.
    """

    calibration: list[Batch]
    checks: list[Batch]
    description: str
    real: bool = True
    unseen: Sequence[Batch] = ()
    data_free: bool = False
    guess: bool = False
    held: Sequence[Batch] = ()
    evaluation: Sequence[Batch] = ()
    evaluated_on: str = ""
    none_aside: str = ""
    bundled: bool = False
    own: int = 0
    verified: bool = True

    @property
    def checked(self) -> list[Batch]:
        """The check batches, where they are run."""
        return self.checks if self.verified else []

    @property
    def measured_on(self) -> str:
        """What the accuracy is told on, in words."""
        if self.evaluation:
            return self.evaluated_on
        count = f"{len(self.checks)} batch{'es' * (len(self.checks) != 1)} of {self.checks[0].rows} rows"
        if not self.real:
            return f"{count} of random inputs: --eval-data FILE … gives real ones"
        if self.data_free:
            return f"{count} that the model sampled and calibration has not seen"
        why = f" ({self.none_aside})" if self.none_aside else ""
        return f"{count} of the calibration data itself{why}: --eval-data FILE … gives others"


@dataclass(frozen=True)
class Sampling:
    """How much is taken of the data, for `gather`.

    samples: windows of text, or images. context: tokens of a window. aside: some of it, or more, is held aside for
    choices by measured errors. bound: such a choice is to keep a bound, and is judged by what is held aside of that.
    seed, provider: of what the model samples itself, and where it runs. accuracy: rows of arrays and pictures are held
    aside to tell the accuracy on (`aside.for_accuracy`); texts have such rows without that. few: random tokens to check
    on are few.
    """

    samples: int
    context: int
    aside: bool = False
    seed: int = 0
    provider: str = "cpu"
    bound: bool = False
    accuracy: bool = False
    few: bool = False


@dataclass(frozen=True)
class Calibration:
    """What the user gives, for `gather`.

    files: texts, .npz or .npy files, images, folders of them, or module:name; or one word that is no file. tokenizer:
    its folder. reader: instead of files, an object with `get_next` as ONNX Runtime's CalibrationDataReader has it, or
    an iterable of batches (`readers.by_name`). pictures: what is done to images. texts: documents in memory, instead of
    files. general: the bundled text, alone or with half of the windows; GENERAL among the files. bundled: what it is
    read from, where that is not the package.
    """

    files: Sequence[str] = ()
    tokenizer: Path | None = None
    reader: Reader | Iterable[Any] | None = None
    pictures: Pictures = field(default_factory=Pictures)
    texts: Sequence[str] = ()
    general: bool = False
    bundled: Path | None = None

    def __post_init__(self) -> None:
        files = [str(file) for file in self.files]  # programs have paths
        if GENERAL in files and not Path(GENERAL).exists():
            files = [file for file in files if file != GENERAL]
            object.__setattr__(self, "general", True)
        object.__setattr__(self, "files", files)

    @property
    def word(self) -> str:
        """SELF or NORMS, where that is given and no file of the name is there; else empty."""
        alone = self.files[0] if len(self.files) == 1 else ""
        return alone if alone in (SELF, NORMS) and not Path(alone).exists() else ""

    @property
    def words(self) -> list[str]:
        """The files as the command line is given them."""
        return [*([GENERAL] if self.general else []), *self.files]

    @property
    def paths(self) -> list[str]:
        """The files, and folders of them, that are read: none for a word that is no file."""
        own = [] if self.word else list(self.files)
        default = not self.files and not self.texts and self.reader is None
        return own + ([str(self.bundled)] if self.bundled is not None and (self.general or default) else [])

    @property
    def only_files(self) -> bool:
        """Whether the content of the files tells all: no program, no folders, no images, which have settings."""
        plain = (Path(file).suffix.lower() not in IMAGES and not Path(file).is_dir() for file in self.files)
        return self.reader is None and not self.texts and all(plain) and not any(map(is_reference, self.files))

    @classmethod
    def of(cls, given: "Given") -> "Calibration":
        """The same, or files alone, or a reader alone."""
        if isinstance(given, Calibration):
            return given
        if isinstance(given, str | Path):
            return cls([str(given)])
        if isinstance(given, Sequence) and all(isinstance(file, str | Path) for file in given):
            return cls([str(file) for file in given])
        return cls(reader=given)


# What functions take for calibration data: files, or a reader, alone or with settings.
Given = Calibration | Path | Sequence[str | Path] | Reader | Iterable[Mapping[str, Any]]


def gather(
    plan: InputPlan, model: Path, sampling: Sampling, given: Calibration, *, needed: bool, learnt: bool = False
) -> Data:
    """The calibration data of a model; with `needed` False only what the checks take.

    learnt: ranges were learnt before, on all of it perhaps.
    """
    if sum(map(bool, (given.reader is not None, given.files, given.texts))) > 1:
        raise UserError("give calibration files, texts or a reader, not several of them")
    if given.word and not given.general:
        return _data_free(plan, model, sampling, given.word, needed=needed)
    files = Files.of(given.files)
    if given.general and (files.arrays or files.images or files.reference or given.reader is not None):
        raise UserError(f"--calibration {GENERAL} is text: give it alone, or with files of text")
    if files.arrays or files.images or files.reference or given.reader is not None:
        return _from_batches(plan, model, sampling, given, files, needed=needed, learnt=learnt)
    if plan.floats or plan.unknown or plan.ids is None:
        if needed:
            plan.require_tokens()
        return _random(plan, few=sampling.few)
    found = load_tokenizer(given.tokenizer) if given.tokenizer is not None else _beside(model)
    if found is None and (files.texts or given.texts or given.general):
        told = f"--calibration {given.words[0]}" if files.texts or given.general else "the calibration data"
        raise UserError(f"{told} is text, but no tokenizer.json lies beside {model}: give --tokenizer")
    if found is not None:
        data = _from_text(plan, sampling, found, *_sources(given, files), needed=needed, learnt=learnt)
        return replace(data, bundled=given.general or not (given.texts or files.texts))
    return _data_free(plan, model, sampling, SELF, needed=needed, why=" (no tokenizer beside it)")


def _from_batches(
    plan: InputPlan, model: Path, sampling: Sampling, given: Calibration, files: Files, *, needed: bool, learnt: bool
) -> Data:
    """The data of arrays, images, or a program. Where nothing is fitted to it, all of it may tell the accuracy."""
    batches, described = _batches_given(plan, model, sampling, given, files)
    shown, why = list[Batch](), ""
    if sampling.accuracy and files.images:
        shown = pictures_left_out(plan, files.images, given.pictures.beside(model), sampling.samples, aside.MOST)
    if sampling.accuracy and sum(batch.rows for batch in shown) < aside.FEWEST:
        batches, shown, why = aside.for_accuracy(plan, batches)
        rows = sum(batch.rows for batch in shown)
        described += f"; {rows} rows of them held aside to tell the accuracy on" if shown else ""
    taken, others = aside.apart(plan, batches) if sampling.aside and not learnt else (batches, [])
    described += f", {len(others)} more held aside for choices" if others else ""
    halves = sampling.bound and len(others) > 1
    others, held = (others[::2], others[1::2]) if halves else (others, [])
    checks = batches[:_CHECKS]
    if all(batch.follows is None for batch in checks):
        checks = [beginning(plan, batch, _CHECK_TOKENS) for batch in checks]
    made = Data(taken if needed else [], checks, described, unseen=others, held=held, none_aside=why)
    if not shown and not needed and not learnt and all(batch.follows is None for batch in batches):
        shown = batches[_CHECKS:][:_JUDGED]  # nothing but checks is run on any
    if not shown:
        return made
    told = f"{sum(batch.rows for batch in shown)} rows of {_source(given, files)}, not calibrated on"
    return replace(made, evaluation=shown, evaluated_on=told)


def _source(given: Calibration, files: Files) -> str:
    """Arrays, images or a program in a few words."""
    if files.arrays or files.images:
        return _names([Path(file) for file in given.files])
    return label_of(files.reference or given.reader)


def _batches_given(
    plan: InputPlan, model: Path, sampling: Sampling, given: Calibration, files: Files
) -> tuple[list[Batch], str]:
    """(batches, what they are) of arrays, images, or a program."""
    if files.arrays:
        batches, remarks = npz_batches(plan, files.arrays), array_conversions(plan, files.arrays)
        return batches, "; ".join([f"{len(batches)} batches of {_names(files.arrays)}", *remarks])
    if files.images:
        picture_input(plan).check(given.pictures.size)
        return picture_batches(plan, files.images, given.pictures.beside(model), sampling.samples)
    label = _source(given, files)
    batches, remarks = read_batches(plan, files.reference or given.reader, label)
    return batches, "; ".join([f"{len(batches)} batches of {label}", *remarks])


def with_evaluation(plan: InputPlan, model: Path, data: Data, given: Calibration) -> Data:
    """The data with batches of the user's for the accuracy that is told: files of arrays or images, or texts."""
    files = Files.of(given.files)
    if not files.texts and not given.texts and not given.general:
        batches = data_batches(plan, model, given)
        where = _names([Path(file) for file in given.files]) if given.files else "the evaluation data"
        rows = sum(batch.rows for batch in batches)
        return replace(data, evaluation=batches, evaluated_on=f"{rows} row{'s' * (rows != 1)} of {where}")
    sources, told = _sources(given, files)
    found = load_tokenizer(given.tokenizer or model)
    before, count = found.before(decoder=plan.logits is not None), _GIVEN * (plan.batch or 1)
    found.check_vocabulary(plan.vocabulary, before)
    length = max((plan.sequence or _JUDGED_TOKENS) - len(before), 1)
    ids = _mixed([_encoded(plan, found, documents) for documents in sources], length, count)
    windows = begun(before, spread(ids, length if plan.sequence else min(length, max(len(ids), 2)), count))
    if not windows:
        raise UserError(f"{told}: the evaluation text has {len(ids)} tokens: give at least two")
    batches = [batch for batch in token_batches(plan, windows) if batch.follows is None]
    described = f"{len(windows)} windows of {len(windows[0])} tokens of {told}"
    return replace(data, evaluation=batches, evaluated_on=described)


def data_batches(plan: InputPlan, model: Path, given: Calibration) -> list[Batch]:
    """The batches of files of arrays or of images, of folders of them, or of a program; all of them."""
    files = Files.of(given.files)
    if files.images:
        return picture_batches(plan, files.images, given.pictures.beside(model), len(files.images))[0]
    if not files.arrays and not files.reference and given.reader is None:
        told = f"{files.texts[0]}: " if files.texts else f"{GENERAL} is text: " if given.general else ""
        raise UserError(f"{told}no array (.npz, .npy) and no image")
    return _batches_given(plan, model, Sampling(1, 2), given, files)[0]


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
    return evenly(left_out(ids, context, count), wanted)[0]


def left_out(ids: Sequence[int], context: int, count: int) -> list[Ids]:
    """The windows of `context` tokens that `spread` of `count` leaves out, in order."""
    flat = np.asarray(ids, np.int64)
    whole = len(flat) // context
    if whole <= count:
        return []
    left = np.setdiff1d(np.arange(whole), np.linspace(0, whole - 1, count).round().astype(int))
    return [flat[i * context : (i + 1) * context] for i in left]


def evenly(windows: Sequence[Ids], wanted: int) -> tuple[list[Ids], list[Ids]]:
    """(up to `wanted` of the windows, spread evenly over them; the others)."""
    chosen = set(((np.arange(wanted) + 0.5) / max(wanted, 1) * len(windows)).astype(int).tolist())
    parts: tuple[list[Ids], list[Ids]] = ([], [])
    for number, window in enumerate(windows):
        parts[number not in chosen].append(window)
    return parts


def _sources(given: Calibration, files: Files) -> tuple[list[Sequence[str]], str]:
    """(documents of each source of text, what they are in words): the bundled text, what the user gives, or both."""
    own, told = given.texts, f"{len(given.texts)} texts given" if len(given.texts) > 1 else "the text given"
    if files.texts:
        own, told = read_texts(files.texts), _names(files.texts)
    if own and not given.general:
        return [own], told
    text = calibration_text() if given.bundled is None else given.bundled.read_text(encoding="utf-8")
    general = f"{'the' if given.bundled is None else 'most of the'} bundled text (speeches and a novel, English)"
    return ([[text], own], f"{general} mixed with {told}") if own else ([[text]], general)


def _encoded(plan: InputPlan, tokenizer: Tokenizer, documents: Sequence[str]) -> Sequence[int]:
    ids = [token for document in documents for token in tokenizer.encode(document)]
    tokenizer.check_vocabulary(plan.vocabulary, ids)
    return ids


def _mixed(parts: Sequence[Sequence[int]], context: int, count: int) -> Sequence[int]:
    """The tokens of one source; of two, as many whole windows of each, spread evenly over it: where one has too few,
    so many of the other that there are `count`.
    """
    if len(parts) == 1:
        return parts[0]
    if short := [len(own) for own in parts if len(own) < context]:
        told = (
            f"of the texts to be mixed one has {short[0]} tokens, and a window {context}: nothing of it would be there"
        )
        raise UserError(f"{told}; give more of it, or leave it out")
    least = min(len(own) // context for own in parts)
    limit = max(least, count - least)
    return [token for own in parts for window in spread(own, context, limit) for token in window.tolist()]


def _from_text(
    plan: InputPlan,
    sampling: Sampling,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[str]],
    source: str,
    *,
    needed: bool,
    learnt: bool,
) -> Data:
    before = tokenizer.before(decoder=plan.logits is not None)
    tokenizer.check_vocabulary(plan.vocabulary, before)
    context = max((plan.sequence or sampling.context) - len(before), 1)
    parts = [_encoded(plan, tokenizer, documents) for documents in sources]
    ids = _mixed(parts, context, sampling.samples + _BESIDE * (plan.batch or 1))
    windows = spread(ids, context, sampling.samples)
    if not windows:
        raise UserError(f"the calibration text has {len(ids)} tokens: give at least two")
    if needed and len(windows) < sampling.samples:
        _log.warning(
            "the calibration text holds %d windows of %d tokens, not %d", len(windows), context, sampling.samples
        )
    left, held, size = left_out(ids, context, sampling.samples), list[Ids](), plan.batch or 1
    others, left = evenly(left, _UNSEEN * size) if sampling.aside else ([], left)
    held, left = evenly(left, _UNSEEN * size) if sampling.bound else ([], left)
    free = [] if needed or learnt else windows[_CHECKS * size :]
    shown = _shown(plan, ids, left, free, context, _JUDGED_TOKENS - len(before))
    if sampling.aside and not others and len(windows) >= 2 * (plan.batch or 1):  # a text that is all windows
        stacks = min(_UNSEEN, max(len(windows) // (plan.batch or 1) // 4, 1))
        cut = len(windows) - stacks * (plan.batch or 1)
        windows, others = windows[:cut], windows[cut:]
    windows, others, held, shown = (begun(before, own) for own in (windows, others, held, shown))
    length = f"{len(windows[0])}"
    if plan.logits is None and not plan.past and not plan.sequence and plan.batch in (None, 1):
        windows, others, held, shown = (_as_texts(tokenizer, own) for own in (windows, others, held, shown))
        length = f"{min(map(len, windows))} to {max(map(len, windows))}"
    calibration = _batches(plan, windows) if needed else []
    described = f"{len(windows)} windows of {length} tokens from {source}" if needed else source
    unseen, judging, judged = (token_batches(plan, own) if len(own) >= size else [] for own in (others, held, shown))
    judged = judged if all(batch.follows is None for batch in judged) else []
    told = f"{len(shown)} windows of {len(shown[0])} tokens of {source}, not calibrated on" if judged else ""
    checks = _checks(plan, windows)
    why = "" if judged else f"all of the text is {'calibrated' if needed or learnt else 'checked'} on"
    data = Data(calibration, checks, described, unseen=unseen, held=judging, none_aside=why)
    return replace(data, evaluation=judged, evaluated_on=told)


def _shown(
    plan: InputPlan, ids: Sequence[int], left: Sequence[Ids], free: Sequence[Ids], context: int, most: int
) -> list[Ids]:
    """The windows that accuracy is told on, cut to `most` tokens where the graph allows it: of those that were left
    out, or that nothing needs; else what follows the last whole window.
    """
    whole = len(ids) // context * context
    rest = np.asarray(ids[whole:] if whole else [], np.int64)  # a text that is no longer is a window itself
    windows, _ = evenly(left or free or ([rest] if len(rest) > 1 else []), _JUDGED * (plan.batch or 1))
    if plan.sequence:
        return [window for window in windows if len(window) == context]
    length = min([most, *map(len, windows)])
    return [window[:length] for window in windows]


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


def _data_free(plan: InputPlan, model: Path, sampling: Sampling, kind: str, *, needed: bool, why: str = "") -> Data:
    """Case 1: nothing is needed: random checks. Case 2: "norms". Case 3: tokens sampled from the model, and as many
    random ones, in which the model meets more than it says by itself.

    Checks are sampled, too, but by another seed, so that statistics have not seen them.
    """
    if not needed:
        return _random(plan, few=sampling.few)
    if plan.logits is None:
        if kind == NORMS:
            return replace(_random(plan), description="none: scales of norms stand in", data_free=True, guess=True)
        raise UserError(
            "no tokenizer lies beside the model, and it is no decoder to sample text from: give --tokenizer, or "
            "--calibration norms for passes that need no more"
        )
    # Weights of a large model stay mapped, pages that the system may take back; of half precision ONNX Runtime makes
    # float32 all the same.
    prepack = sum(file.stat().st_size for file in (model, *data_files(model))) <= _PREPACKED
    running = session(model, providers=(sampling.provider,), kernels="portable", prepack=prepack)
    count = _CHECKS * (plan.batch or 1)
    checks = _checks(plan, sample_windows(running, plan, count, _CHECK_TOKENS, sampling.seed + 1))
    if kind == NORMS:
        return Data([], checks, "none: scales of norms stand in", data_free=True, guess=True)
    windows = sample_windows(running, plan, sampling.samples, sampling.context, sampling.seed)
    random = np.random.default_rng(sampling.seed).integers(plan.vocabulary or 2, size=(len(windows), len(windows[0])))
    described = f"{len(windows)} windows of {len(windows[0])} tokens sampled from the model itself{why}"
    described += ", and as many of random tokens"
    count, seed = _UNSEEN * (plan.batch or 1), sampling.seed
    unseen, held = (
        token_batches(plan, sample_windows(running, plan, count, sampling.context, seed + more)) if wanted else []
        for more, wanted in ((2, sampling.aside), (3, sampling.bound))
    )
    own, more = _batches(plan, windows), token_batches(plan, list(random))
    return Data(own + more, checks, described, data_free=True, unseen=unseen, held=held, own=len(own))


def _random(plan: InputPlan, *, few: bool = False) -> Data:
    """Checks on random inputs, for a compile that needs no data. few: fewer tokens."""
    rng = np.random.default_rng(0)
    if plan.ids is not None and not plan.floats and not plan.unknown:
        checks, tokens = (_FEW_CHECKS, _FEW_TOKENS) if few else (_CHECKS, _CHECK_TOKENS)
        length, count = plan.sequence or tokens, checks * (plan.batch or 1)
        windows = [rng.integers(plan.vocabulary or 2, size=length) for _ in range(count)]
        return Data([], token_batches(plan, windows, decode_step=bool(plan.past)), "random tokens (checks only)", False)
    feeds, sizes = dict(plan.fillers()), _named_sizes(plan)
    for given in plan.inputs:
        if not given.ranked and given.name not in feeds:
            raise UserError(
                f"graph input {given.name!r} has no rank to draw numbers of: give its arrays (--calibration)"
            )
        shape = [
            dim if isinstance(dim, int) and dim > 0 else sizes.get(dim) or _free(i, len(given.shape))
            for i, dim in enumerate(given.shape)
        ]
        if given.is_string:
            feeds[given.name] = np.full(shape, "a", object)
        elif given.name not in feeds:
            draw = rng.normal(size=shape) if given.is_float else rng.integers(0, 2, size=shape)
            feeds[given.name] = np.asarray(draw).astype(given.dtype)
    return Data([], [Batch(feeds, 1)], "random normal inputs (checks only; give .npz files for real ones)", False)


def _named_sizes(plan: InputPlan) -> dict[Dim, int]:
    """One size for each name of a free dimension, whatever inputs have it: the smallest that `_free` gives."""
    sizes: dict[Dim, int] = {}
    for given in plan.inputs:
        for axis, dim in enumerate(given.shape):
            if isinstance(dim, str):
                own = _free(axis, len(given.shape))
                sizes[dim] = min(sizes.get(dim, own), own)
    return sizes


def _free(axis: int, rank: int) -> int:
    """A size for a free dimension: one batch, images large enough for every stride, short sequences."""
    if axis == 0:
        return 1
    return 64 if rank == 4 else 16


def _beside(model: Path) -> Tokenizer | None:
    path = find_tokenizer(model)
    return load_tokenizer(path) if path is not None else None


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
