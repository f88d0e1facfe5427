"""What the models of a sweep are scored on: text or arrays that calibration has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.data.feeds import InputPlan, npz_batches, token_batches
from qcompile.compiler.data.tokens import find_tokenizer, load_tokenizer
from qcompile.compiler.files.cache import digest, files_digest, write_atomically
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.sweep.metric import Metric, OutputMetric, Running, TextMetric
from qcompile.models.text import calibration_text
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import operator_kernels

# Of the bundled text, this share at its end is kept from calibration where it is what models are scored on.
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Evaluation:
    """What models are scored on: a text, or .npz files, or by default the end of the bundled text.

    context, tokens: of a window and of all of them, 0 tokens for the whole text. kernels, provider: as `qcompile eval`.
    """

    text: Path | None = None
    data: Sequence[Path] = ()
    context: int = 512
    tokens: int = 2048
    kernels: str = "auto"
    provider: str = "cpu"

    def __post_init__(self) -> None:
        if self.text and self.data:
            raise UserError("give either --text FILE or --data FILE.npz … to score models on, not both")
        if self.tokens < 2 and self.tokens != 0:
            raise UserError(f"--tokens must be at least 2 (or 0 for the whole text), got {self.tokens}")


@dataclass(frozen=True)
class Scoring:
    """A metric; its settings, which decide the figures; its data in words; the calibration text left beside it.

    files: what must not be calibrated on, too.
    """

    metric: Metric
    identity: dict[str, Any]
    source: str
    calibration: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


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
        batches = npz_batches(plan, wanted.data)
        identity: dict[str, Any] = {"data": files_digest(wanted.data), "kernels": by, "provider": wanted.provider}
        source = f"{len(batches)} batches of {', '.join(path.name for path in wanted.data[:3])}; {by}"
        return Scoring(OutputMetric(model, batches, running), identity, source, files=tuple(wanted.data))
    if plan.ids is None or plan.floats or plan.unknown:
        raise UserError(f"{model} cannot be fed from text: give inputs to score it on with --data FILE.npz …")
    found = load_tokenizer(tokenizer or model)
    text, rest = (wanted.text, ()) if wanted.text else _split_bundled(folder)
    windows = text_windows(text, found, plan, wanted.context, wanted.tokens or None)
    told = (
        text.name
        if wanted.text
        else "the end of the bundled text (held out of calibration, which has earlier chapters of the same book)"
    )
    identity = {
        "text": files_digest([text, found.path]),
        "windows": [len(window) for window in windows],
        "kernels": by,
        "provider": wanted.provider,
    }
    source = f"{told}, {len(windows)} windows of {len(windows[0])} tokens; {by}"
    metric: Metric = OutputMetric(model, token_batches(plan, windows), running)
    if plan.logits is not None:
        metric = TextMetric(model, windows, running, folder / "cache", digest(identity | {"model": source_hash}))
    return Scoring(metric, identity, source, tuple(map(str, rest)), (text,))


def calibration_digest(files: Sequence[str], scored: Sequence[Path], tokenizer: Path) -> str:
    """The content of calibration files and of the tokenizer at or beside a path, if there is one.

    Raises UserError for a file that models are scored on.
    """
    taken = {files_digest([path]): path for path in scored}
    for file in files:
        if files_digest([file]) in taken:
            raise UserError(f"{file} is calibrated on and scored on: give another --text, or other calibration data")
    beside = find_tokenizer(tokenizer)
    return files_digest([*files, *([beside] if beside else [])])


def _split_bundled(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    """(evaluation, (calibration,)): files with the bundled text's end, from the beginning of a line, and the rest."""
    text = calibration_text()
    cut = text.index("\n", round(len(text) * (1 - _HELD_OUT))) + 1
    parts = {"evaluation": text[cut:], "calibration": text[:cut]}
    for name, part in parts.items():
        write_atomically(folder / "text" / f"{name}.txt", part)
    return folder / "text" / "evaluation.txt", (folder / "text" / "calibration.txt",)
