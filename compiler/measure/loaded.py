"""A model ready to be run and judged: its file, the roles of its inputs, its session."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.feeds import Batch, token_batches
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.tokens import Ids, Tokenizer, read_text, windows
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.metrics import check_finite_output
from qcompile.compiler.measure.randomness import repeatable
from qcompile.models.text import read_texts
from qcompile.passes.errors import UserError
from qcompile.runtime.caches import Decoder
from qcompile.runtime.sessions import run


class Subject:
    """A model under evaluation: its file, the roles of its inputs, an ONNX Runtime session."""

    def __init__(self, path: Path, *, accuracy_level: int = 0, provider: str = "cpu", kernels: str = "auto") -> None:
        self.path = path
        self.plan: InputPlan = input_plan(load_model(path))
        settings: dict[str, Any] = {"providers": (provider,), "accuracy_level": accuracy_level, "kernels": kernels}
        settings["growing"] = bool(self.plan.past)
        self.session: Any = repeatable(path, **settings)
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]

    def require_decoder(self) -> str:
        """The name of the logits of a model that is a decoder."""
        try:
            return self.plan.require_decoder()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def logits(self, window: Ids) -> npt.NDArray[Any]:
        """The logits (L, V) of a window (L,)."""
        name = self.require_decoder()
        if self.plan.vocabulary and window.max() >= self.plan.vocabulary:
            raise UserError(
                f"{self.path}: token id {window.max()} in the text, {self.plan.vocabulary} in the vocabulary"
            )
        batches = token_batches(self.plan, [window] * (self.plan.batch or 1))
        if len(batches) == 1:  # caches are computed, and never fetched
            parts = [run(self.session, [name], batches[0].feeds)[0]]
        else:
            decoder = Decoder(self.session, self.plan.caches, [name])
            parts = [decoder.run(batch.feeds)[0] for batch in batches]
        logits = np.concatenate([part[0] for part in parts])
        check_finite_output(logits, name, str(self.path))
        if len(logits) < min(2, len(window)):
            raise UserError(
                f"{self.path}: output {name!r} scores {len(logits)} of {len(window)} tokens, all are needed: evaluate "
                "the same model exported with --logits all"
            )
        return logits

    def run(self, batch: Batch, names: list[str]) -> dict[str, npt.NDArray[Any]]:
        """The named outputs of a batch that follows none; caches in floats."""
        found = run(self.session, names, self.plan.coded(batch.feeds))
        outputs = self.plan.decoded(dict(zip(names, found, strict=True)))
        for name, array in outputs.items():
            check_finite_output(array, name, str(self.path))
        return outputs


def scored_documents(path: Path) -> list[str]:
    """The texts of a file that models are judged on: of .jsonl one a line, as calibration reads it; else all of it."""
    return read_texts([path]) if path.suffix.lower() == ".jsonl" else [read_text(path)]


def text_windows(path: Path, tokenizer: Tokenizer, plan: InputPlan, context: int, tokens: int | None) -> list[Ids]:
    """Windows over the first `tokens` tokens of a text file, checked against the model's vocabulary.

    An encoder's text has [CLS] and [SEP] around it. Each window of a decoder begins with what its tokenizer puts before
    a text: BOS, or nothing.
    """
    special = plan.logits is None
    ids = [own for text in scored_documents(path) for own in tokenizer.encode(text, special=special)][:tokens]
    before = tokenizer.before(decoder=not special)
    tokenizer.check_vocabulary(plan.vocabulary, [*before, *ids])
    return windows(ids, plan.sequence if plan.sequence and not plan.past else context, before=before)
