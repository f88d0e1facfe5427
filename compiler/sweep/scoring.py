"""What the models of a sweep are scored on: text or arrays that calibration has not seen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.compiler.data.apart import digests, repeated_rows, repeated_share
from qcompile.compiler.data.calibration import Calibration, data_batches
from qcompile.compiler.data.calibration_files import GENERAL, Files, named
from qcompile.compiler.data.feeds import Batch, InputPlan, npz_batches, token_batches
from qcompile.compiler.data.tokens import Tokenizer, find_tokenizer, load_tokenizer
from qcompile.compiler.files.cache import digest, files_digest, write_atomically
from qcompile.compiler.measure.loaded import scored_documents, text_windows
from qcompile.compiler.sweep.metric import Metric, OutputMetric, Running, TextMetric
from qcompile.models.text import calibration_text, read_texts
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import operator_kernels

# Of the bundled text, this share at its end is kept from calibration where it is what models are scored on.
_HELD_OUT = 0.1
# Of a text that models are scored on, this share may be in what is calibrated on: a licence above every file, say.
_REPEATED = 0.1


@dataclass(frozen=True)
class Evaluation:
    """What models are scored on: texts, or arrays or images, or by default the end of the bundled text.

    texts: files; GENERAL for that end. data: files, and folders of them.
    context, tokens: of a window and of all of a text, 0 tokens for the whole text. kernels, provider: as
    `qcompile eval`.
    """

    texts: Sequence[Path] = ()
    data: Sequence[Path] = ()
    context: int = 512
    tokens: int = 2048
    kernels: str = "auto"
    provider: str = "cpu"

    def __post_init__(self) -> None:
        if self.texts and self.data:
            raise UserError("give either --text FILE or --data FILE.npz … to score models on, not both")
        if self.tokens < 2 and self.tokens != 0:
            raise UserError(f"--tokens must be at least 2 (or 0 for the whole text), got {self.tokens}")


@dataclass(frozen=True)
class Scoring:
    """A metric; its settings, which decide the figures; its data in words.

    texts, batches: what must not be calibrated on, too, of texts by their names as far as they are scored; files: where
    that lies. bundled: what is left of the bundled text for calibration, where its end is scored.
    """

    metric: Metric
    identity: dict[str, Any]
    source: str
    bundled: Path | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    batches: Sequence[Batch] = ()

    def check_apart(self, plan: InputPlan, given: Calibration) -> None:
        """Raise UserError where data of a row is what every row is scored on, whatever files it comes in.

        Case 1: the same file. Case 2: more than a tenth of what is scored of a text. Case 3: rows of scored arrays.
        """
        calibrated, files = digests(map(Path, named(given.paths))), Files.of(given.paths)
        for content, name in digests(self.files).items():  # Case 1
            if content in calibrated:
                raise UserError(f"{name} is calibrated on and scored on: {_OTHERS}")
        own = read_texts(files.texts) if files.texts and self.texts else []
        if self.texts and given.bundled is None and (given.general or not given.files):
            own.append(calibration_text())
        for name, text in self.texts.items():  # Case 2
            if (share := repeated_share(text, own)) > _REPEATED:
                told = f"{share:.0%} of what models are scored on of {name}"
                raise UserError(f"{told} is in the calibration data {' '.join(given.words) or GENERAL}: {_OTHERS}")
        if self.batches and files.arrays:  # Case 3
            rows = sum(batch.rows for batch in self.batches)
            if count := repeated_rows(self.batches, npz_batches(plan, files.arrays)):
                told = f"{count} of {rows} rows that models are scored on"
                raise UserError(f"{told} are in the calibration data {' '.join(given.words)}: {_OTHERS}")


_BUNDLED = "the end of the bundled text (held out of calibration, which has earlier chapters of the same book)"
_OTHERS = "give other data to score on (--text, --data), or to calibrate on"


def scoring(
    plan: InputPlan, model: Path, source_hash: str, tokenizer: Path | None, wanted: Evaluation, folder: Path
) -> Scoring:
    """How to score compiled forms of a model. KL on text for a decoder, else the error of its outputs.

    source_hash: of the model. folder: the sweep's own, for the parts of the bundled text and what is kept of the float
    model's outputs.
    Raises UserError where the model cannot be fed with what is given.
    """
    running = Running(wanted.kernels, wanted.provider)
    by = operator_kernels(wanted.kernels, wanted.provider)
    if wanted.data:
        batches = data_batches(plan, model, Calibration([str(path) for path in wanted.data]))
        files = named([*map(str, wanted.data)])
        identity: dict[str, Any] = {"data": files_digest(files), "kernels": by, "provider": wanted.provider}
        told = ", ".join(path.name for path in wanted.data[:3])
        source = f"{len(batches)} batches of {told}; {by}"
        return Scoring(OutputMetric(model, batches, running), identity, source, files=files, batches=batches)
    if plan.ids is None or plan.floats or plan.unknown:
        raise UserError(f"{model} cannot be fed from text: give inputs to score it on with --data FILE.npz …")
    found, bundled, texts = load_tokenizer(tokenizer or model), None, dict[str, Path]()
    for text in wanted.texts or [Path(GENERAL)]:
        general = str(text) == GENERAL and not text.exists()
        if general and bundled is not None:
            continue
        if text.name in texts:
            raise UserError(f"--text: two files are called {text.name}: rename one, their scores have the names")
        if general:
            bundled, texts[GENERAL] = _split_bundled(folder)
        else:
            texts[text.name] = text
    windows = {
        name: text_windows(text, found, plan, wanted.context, wanted.tokens or None) for name, text in texts.items()
    }
    every = [window for own in windows.values() for window in own]
    identity = {
        "text": files_digest([*texts.values(), found.path]),
        "windows": [len(window) for window in every],
        "kernels": by,
        "provider": wanted.provider,
        **({"names": [*texts]} if len(texts) > 1 else {}),  # scores have them
    }
    files = [text for name, text in texts.items() if name != GENERAL or bundled is None]
    told = ", ".join(name if text in files else _BUNDLED for name, text in texts.items())
    source = f"{told}, {len(every)} window{'s' * (len(every) != 1)} of {len(every[0])} tokens; {by}"
    metric: Metric = OutputMetric(model, token_batches(plan, every), running)
    if plan.logits is not None:
        metric = TextMetric(model, windows, running, folder / "cache", digest(identity | {"model": source_hash}))
    scored = {name: _scored("\n".join(scored_documents(text)), found, wanted.tokens) for name, text in texts.items()}
    return Scoring(metric, identity, source, bundled, scored, files)


def _scored(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """About so many tokens of a text, from its beginning; all of it for 0."""
    share = tokens / max(len(tokenizer.encode(text)), 1) if tokens else 1.0
    return text[: math.ceil(len(text) * share)]


def calibration_digest(given: Calibration, tokenizer: Path) -> str:
    """What names calibration data: the words, and the content of the files and of the tokenizer at or beside a path."""
    beside = find_tokenizer(tokenizer)
    files = [*named(given.paths), *([beside] if beside else [])]
    return digest({"files": files_digest(files), "general": given.general or not given.files, "word": given.word})


def _split_bundled(folder: Path) -> tuple[Path, Path]:
    """(calibration, evaluation): files with most of the bundled text, and with its end, cut between lines."""
    text = calibration_text()
    cut = text.index("\n", round(len(text) * (1 - _HELD_OUT))) + 1
    parts = {"calibration": text[:cut], "evaluation": text[cut:]}
    for name, part in parts.items():
        write_atomically(folder / "text" / f"{name}.txt", part)
    return folder / "text" / "calibration.txt", folder / "text" / "evaluation.txt"
