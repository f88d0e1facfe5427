"""Bounds that a model has to keep, and what is said where it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores
from qcompile.compiler.measure.metric import Drop
from qcompile.passes.errors import UserError, Verdict


@dataclass(frozen=True)
class Bounds:
    """min_sqnr: dB, of every output. max_kl: nats a token, of every text. max_drop: of the score, see `Drop`.

    The score is that of --metric, else the accuracy by labels, else the share of rows whose most likely class stays.
    """

    min_sqnr: float | None = None
    max_kl: float | None = None
    max_drop: Drop | None = None
    lower_is_better: bool = False

    def check(self, scores: Sequence[DecoderScores | OutputScores]) -> None:
        """Raise Verdict, which names everything that is broken, and UserError for a bound that the scores have not."""
        decoders = [own for own in scores if isinstance(own, DecoderScores) and own.kl is not None]
        outputs = [own for own in scores if isinstance(own, OutputScores)]
        if self.max_kl is not None and not decoders:
            raise UserError("--max-kl is for decoders on --text, with --against: give --min-sqnr for outputs")
        if self.min_sqnr is not None and not outputs:
            raise UserError("--min-sqnr is for outputs of models that are no decoders: give --max-kl")
        broken = [*self._texts(decoders), *self._outputs(outputs), *self._drops(outputs)]
        if broken:
            raise Verdict("; ".join(broken))

    def check_asked(self, *, texts: bool, against: bool) -> None:
        """Raise UserError for a bound that what is asked for has no score for: said before the work."""
        if self.max_kl is not None and not (texts and against):
            raise UserError("--max-kl is for decoders on --text, with --against: give --min-sqnr for outputs")

    def check_decoder(self) -> None:
        """Raise UserError for a bound that decoders on text have no score for: said before they are run."""
        told = "a decoder on --text has KL and perplexity: give --max-kl"
        if self.min_sqnr is not None:
            raise UserError(f"--min-sqnr is for outputs of models that are no decoders; {told}")
        if self.max_drop is not None:
            raise UserError(f"--max-drop is for scores of outputs on --data; {told}")

    def _texts(self, scores: Sequence[DecoderScores]) -> Iterator[str]:
        for own in scores if self.max_kl is not None else ():
            if own.kl is not None and self.max_kl is not None and not own.kl <= self.max_kl:
                told = f"KL {own.kl:.4g} ± {own.kl_error:.1g} nats a token"
                yield f"{own.model}: {told} is above --max-kl {self.max_kl:g}"

    def _outputs(self, scores: Sequence[OutputScores]) -> Iterator[str]:
        for own in scores if self.min_sqnr is not None else ():
            if self.min_sqnr is not None and not own.sqnr >= self.min_sqnr:
                yield f"{own.model}: SQNR of {own.output} {own.sqnr:.2f} dB is below --min-sqnr {self.min_sqnr:g}"

    def _drops(self, scores: Sequence[OutputScores]) -> Iterator[str]:
        if self.max_drop is None:
            return
        known = {(own.model, what): pair for own in scores for what, pair in _scores(own)}
        if not known:
            raise UserError("--max-drop needs a score: give --metric module:function, or an output that scores classes")
        for (model, what), (before, after) in known.items():
            lost = self.max_drop.of(before, after, lower_is_better=self.lower_is_better)
            if not lost <= self.max_drop.most:
                drop = f"is {self.max_drop.told(lost)} worse, above --max-drop {self.max_drop.text}"
                yield f"{model}: {what} {before:.4g} → {after:.4g} {drop}"


def _scores(own: OutputScores) -> Iterator[tuple[str, tuple[float, float]]]:
    """(what, (reference's, model's)) of the score that counts."""
    classes = own.classes
    if own.metric is not None and own.reference_metric is not None:
        yield "the metric", (own.reference_metric, own.metric)
    elif classes is not None and classes.reference is not None and classes.accuracy is not None:
        yield f"accuracy of {own.output}", (classes.reference, classes.accuracy)
    elif classes is not None:
        yield f"top-1 agreement of {own.output}", (1.0, classes.top1)
