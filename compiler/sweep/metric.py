"""How the models of a sweep are scored against the float model, which runs once for all of them."""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.lib.format import open_memmap

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.data.tokens import Ids
from qcompile.compiler.files import publish
from qcompile.compiler.files.cache import write_atomically
from qcompile.compiler.measure.evaluate import Counted
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.measure.metrics import OutputNoise, TokenScores, log_softmax_rows, mean_and_error, perplexity
from qcompile.passes.errors import UserError

Scores = dict[str, float]


@dataclass(frozen=True)
class Running:
    """How models are run to be scored; see `qcompile eval`."""

    kernels: str = "auto"
    provider: str = "cpu"

    def subject(self, path: Path) -> Subject:
        """The model at `path`, ready to run, at accuracy level 0."""
        return Subject(path, accuracy_level=0, provider=self.provider, kernels=self.kernels)


class Metric(ABC):
    """Scores of compiled models. `float_scores` are the float model's own, where it has any.

    error: the score that is drawn, and compared for the Pareto front; the smaller the better. axis: its name in words.
    """

    error: ClassVar[str]
    axis: ClassVar[str]
    float_scores: Scores

    @abstractmethod
    def prepare(self, progress: Counted) -> None:
        """Run the float model, unless that was done before."""

    @abstractmethod
    def score(self, path: Path, progress: Counted) -> Scores:
        """The scores of a compiled model; `prepare` must have run."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was kept of the float model's outputs: every combination is done."""


class TextMetric(Metric):
    """A decoder on windows of text: KL(float ‖ model), perplexity and share of equal most likely tokens.

    Of several texts, each by its name, KL is told of each, too. The float model's log-probabilities (scored tokens, V),
    float32, lie in a file of `folder` until the sweep is done.
    """

    error: ClassVar[str] = "kl"
    axis: ClassVar[str] = "KL(float ‖ quantized), nats per token"

    def __init__(
        self, model: Path, texts: Mapping[str, Sequence[Ids]], running: Running, folder: Path, key: str
    ) -> None:
        self.model, self.texts, self.running = model, texts, running
        self.windows = [window for own in texts.values() for window in own]
        self.stored, self.scored = folder / f"reference-{key}.npy", folder / f"reference-{key}.json"
        self.float_scores = json.loads(self.scored.read_text(encoding="utf-8")) if self.scored.exists() else {}

    def prepare(self, progress: Counted) -> None:
        """Run the float model, unless its log-probabilities are there from a sweep that was interrupted."""
        if self.stored.exists() and self.scored.exists():
            return
        subject, scores = self.running.subject(self.model), TokenScores()
        with publish.writing(self.stored), publish.staging(self.stored) as part:
            self._fill(part, subject, scores, progress)
            os.replace(part, self.stored)
        self.float_scores = {"perplexity": perplexity(mean_and_error(scores.nll)[0])}
        write_atomically(self.scored, json.dumps(self.float_scores) + "\n")

    def _fill(self, part: Path, subject: Subject, scores: TokenScores, progress: Counted) -> None:
        kept, start = None, 0
        for number, window in enumerate(self.windows, 1):
            logits = subject.logits(window)[: len(window) - 1]
            scores.add(logits, window[1 : len(logits) + 1], None)
            if kept is None:
                rows = sum(len(each) - 1 for each in self.windows)
                _check_space(part, 4 * rows * logits.shape[1])
                kept = open_memmap(part, "w+", np.float32, (rows, logits.shape[1]))
            kept[start : start + len(logits)] = log_softmax_rows(logits)
            start += len(logits)
            progress(number, len(self.windows))

    def score(self, path: Path, progress: Counted) -> Scores:
        """kl and kl_error in nats per scored token, of several texts those of each; perplexity, agreement."""
        subject, scores, start = self.running.subject(path), TokenScores(), 0
        known: Any = np.load(self.stored, mmap_mode="r")
        ends = [0]
        for number, window in enumerate(self.windows, 1):
            logits = subject.logits(window)[: len(window) - 1]
            scores.add(logits, window[1 : len(logits) + 1], known[start : start + len(logits)])
            start += len(logits)
            ends.append(start)
            progress(number, len(self.windows))
        kl, error = mean_and_error(scores.kl)
        agreement = float(np.concatenate(scores.agree).mean())
        return {
            "kl": kl,
            "kl_error": error,
            **(self._each(np.concatenate(scores.kl), ends) if len(self.texts) > 1 else {}),
            "perplexity": perplexity(mean_and_error(scores.nll)[0]),
            "agreement": agreement,
        }

    def _each(self, kl: Any, ends: Sequence[int]) -> Scores:
        """Of each text, by the KL of all scored tokens in their order. ends: how many those of each window end behind;
        a graph of fixed length leaves out the end of a window.
        """
        found, done = Scores(), 0
        for name, windows in self.texts.items():
            own = kl[ends[done] : ends[done + len(windows)]]
            done += len(windows)
            mean, error = mean_and_error([own])
            found |= {f"kl {name}": mean, f"kl_error {name}": error}
        return found

    def close(self) -> None:
        """Remove the log-probabilities; the perplexity stays."""
        self.stored.unlink(missing_ok=True)


class OutputMetric(Metric):
    """Any model on given batches: relative error, SQNR in dB and cosine, of the output that is worst off.

    The float model's outputs stay in memory, so the batches must be few.
    """

    error: ClassVar[str] = "relative_error"
    axis: ClassVar[str] = "relative error of the output, ‖quantized - float‖ / ‖float‖"

    def __init__(self, model: Path, batches: Sequence[Batch], running: Running) -> None:
        self.model, self.batches, self.running = model, batches, running
        self.float_scores, self.known = {}, list[Arrays]()

    def prepare(self, progress: Counted) -> None:
        """Run the float model on all batches."""
        subject = self.running.subject(self.model)
        for number, batch in enumerate(self.batches, 1):
            outputs = subject.run(batch, subject.outputs)
            self.known.append({name: array for name, array in outputs.items() if array.dtype.kind in "fV"})
            progress(number, len(self.batches))

    def score(self, path: Path, progress: Counted) -> Scores:
        """relative_error, sqnr (dB) and cosine."""
        subject = self.running.subject(path)
        noise = {name: OutputNoise() for name in self.known[0]}
        for number, (batch, known) in enumerate(zip(self.batches, self.known, strict=True), 1):
            for name, array in subject.run(batch, list(known)).items():
                noise[name].add(known[name], array)
            progress(number, len(self.batches))
        worst = min((n for n in noise.values() if n.size), key=lambda n: n.sqnr, default=None)
        if worst is None:
            raise UserError(f"{self.model} has no float output to compare")
        return {"relative_error": 10 ** (-worst.sqnr / 20), "sqnr": worst.sqnr, "cosine": worst.cosine}

    def close(self) -> None:
        """Let go of the outputs."""
        self.known = []


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.parent}: the float model's log-probabilities take {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
            "free; give fewer --tokens or another -o"
        )
