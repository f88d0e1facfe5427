"""How good a model is: perplexity on text, and its distance to a reference model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.labels import Labels, check_classes
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.data.tokens import Ids
from qcompile.compiler.measure.changes import TokenChanges
from qcompile.compiler.measure.classes import Classes, ClassScores, scores_classes
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.measure.metric import Metric
from qcompile.compiler.measure.metrics import OutputNoise, TokenScores, log_softmax_rows, mean_and_error, perplexity
from qcompile.passes.errors import UserError

# Called with how many of how many steps are done.
Counted = Callable[[int, int], None]


@dataclass(frozen=True)
class DecoderScores:
    """A decoder on windows of text. The first token of each window is given, not scored.

    nll: mean negative log-likelihood, nats per scored token. kl: mean KL(reference ‖ model), nats per scored token;
    kl_error: its standard error over tokens, taken as independent. agreement: share of equal most likely tokens.
    accuracy: share of tokens that were the most likely ones. kl, kl_error, agreement and changes are None without a
    reference.
    """

    model: str
    windows: int
    context: int
    scored: int
    accuracy_level: int
    nll: float
    kl: float | None
    kl_error: float | None
    agreement: float | None
    accuracy: float
    changes: TokenChanges | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return perplexity(self.nll)


@dataclass(frozen=True)
class OutputScores:
    """One output of a model against the reference's, over all batches: SQNR in dB, cosine, number of values.

    classes: of an output that scores classes. metric, reference_metric: what a function of the user's says of the model
    and of the reference, on all outputs.
    """

    model: str
    output: str
    sqnr: float
    cosine: float
    values: int
    classes: ClassScores | None = None
    metric: float | None = None
    reference_metric: float | None = None


def evaluate(
    model: Path,
    windows: Sequence[Ids],
    *,
    reference: Path | None = None,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
) -> DecoderScores:
    """The scores of one decoder on windows of token ids; see `evaluate_many`."""
    scores = evaluate_many(
        reference, [model], windows, accuracy_level=accuracy_level, provider=provider, kernels=kernels
    )
    return scores[-1]


def evaluate_many(
    reference: Path | None,
    candidates: Sequence[Path],
    windows: Sequence[Ids],
    *,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
    progress: Counted | None = None,
) -> list[DecoderScores]:
    """Scores of decoders, the reference first if there is one; see `score_tokens`."""
    paths = [*([reference] if reference else []), *candidates]
    subjects = [Subject(path, accuracy_level=accuracy_level, provider=provider, kernels=kernels) for path in paths]
    scores = score_tokens(subjects, windows, compared=reference is not None, progress=progress)
    return decoder_scores(subjects, scores, windows, accuracy_level, compared=reference is not None)


def score_tokens(
    subjects: Sequence[Subject], windows: Sequence[Ids], *, compared: bool, progress: Counted | None = None
) -> list[TokenScores]:
    """Scores of every token by decoders. compared: the first is the others' reference, and runs once for each window.

    In memory are the logits of one window of the reference and of one of a candidate.
    """
    scores = [TokenScores() for _ in subjects]
    done = 0
    for window in windows:
        known: npt.NDArray[np.float32] | None = None
        for index, (subject, score) in enumerate(zip(subjects, scores, strict=True)):
            logits = subject.logits(window)[: len(window) - 1]
            if known is not None and logits.shape != known.shape:
                raise UserError(
                    f"{subject.path} has logits {list(logits.shape)}, {subjects[0].path} {list(known.shape)}: "
                    "only models of one vocabulary can be compared"
                )
            score.add(logits, window[1 : len(logits) + 1], known)
            if compared and index == 0:
                known = log_softmax_rows(logits)
            done += 1
            if progress:
                progress(done, len(windows) * len(subjects))
    return scores


def decoder_scores(
    subjects: Sequence[Subject],
    scores: Sequence[TokenScores],
    windows: Sequence[Ids],
    accuracy_level: int,
    *,
    compared: bool,
) -> list[DecoderScores]:
    """What `score_tokens` found, in numbers; UserError where there was nothing to score."""
    return [
        _decoder_scores(str(subject.path), score, windows, accuracy_level, scores[0] if compared and index else None)
        for index, (subject, score) in enumerate(zip(subjects, scores, strict=True))
    ]


def score_outputs(
    reference: Path,
    candidates: Sequence[Path],
    batches: Callable[[InputPlan], Sequence[Batch]],
    *,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
    progress: Counted | None = None,
    labels: Labels | None = None,
    metric: Metric | None = None,
) -> list[OutputScores]:
    """SQNR and cosine of every output of every candidate, on the batches made for the reference's inputs.

    Outputs of strings, and sequences, have neither; they are left out. labels: of all rows; UserError where neither an
    output that scores classes nor a metric takes them. With a metric, all inputs and outputs stay in memory.
    """
    paths = [reference, *candidates]
    first, *others = (
        Subject(path, accuracy_level=accuracy_level, provider=provider, kernels=kernels) for path in paths
    )
    for other in others:
        missing = [name for name in first.outputs if name not in other.outputs]
        if missing:
            raise UserError(f"{other.path} has no output {missing[0]!r}, which {reference} has")
    noise = {(str(other.path), name): OutputNoise() for other in others for name in first.outputs}
    classes: dict[tuple[str, str], Classes] = {}
    kept: dict[str, list[Arrays]] = {str(subject.path): [] for subject in (first, *others)}
    given = batches(first.plan)
    for number, batch in enumerate(given):
        expected = first.run(batch, first.outputs)
        if metric is not None:
            kept[str(first.path)].append(expected)
        for other in others:
            found = other.run(batch, first.outputs)
            if metric is not None:
                kept[str(other.path)].append(found)
            for name, array in found.items():
                if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufV":
                    continue
                if array.shape != expected[name].shape:
                    raise UserError(
                        f"{other.path}: output {name!r} has shape {list(array.shape)}, "
                        f"that of {reference} {list(expected[name].shape)}"
                    )
                noise[str(other.path), name].add(expected[name], array)
                if scores_classes(name, array):
                    classes.setdefault((str(other.path), name), Classes()).add(expected[name], array)
        if labels is not None and metric is None and not classes:
            raise UserError(
                f"--labels: no output of {reference} scores classes, (rows, classes) and no embedding by its name; "
                f"leave them out, or give a --metric that takes them (outputs: {', '.join(first.outputs)})"
            )
        if progress:
            progress(number + 1, len(given))
    inputs = [batch.feeds for batch in given] if metric is not None else []
    score = {path: metric.score(inputs, made, labels) for path, made in kept.items()} if metric is not None else {}
    known = {key: own.scores(_fitting(labels, own)) for key, own in classes.items()}
    return [
        OutputScores(path, name, n.sqnr, n.cosine, n.size, known.get((path, name)), score.get(path),
                     score.get(str(first.path)))
        for (path, name), n in noise.items()
        if n.size
    ]  # fmt: skip


def _fitting(labels: Labels | None, classes: Classes) -> Labels | None:
    """Labels for the rows of an output; UserError where there are not as many, or a class that it has not."""
    rows = sum(map(len, classes.before))
    if labels is not None:
        check_classes(labels, "--labels")
    if labels is not None and len(labels) != rows:
        raise UserError(f"--labels has {len(labels)} labels, and the evaluation data {rows} rows")
    if labels is not None and len(labels) and int(labels.max()) >= classes.count:
        raise UserError(f"--labels has class {int(labels.max())}, and the output {classes.count} classes (from 0 on)")
    return labels


def _decoder_scores(
    path: str, score: TokenScores, windows: Sequence[Ids], accuracy_level: int, before: TokenScores | None
) -> DecoderScores:
    if not score.nll:
        raise UserError("there is no text to evaluate on")
    nll, _ = mean_and_error(score.nll)
    kl, kl_error = mean_and_error(score.kl) if score.kl else (None, None)
    return DecoderScores(
        model=path,
        windows=len(windows),
        context=max(len(window) for window in windows),
        scored=sum(len(part) for part in score.nll),
        accuracy_level=accuracy_level,
        nll=nll,
        kl=kl,
        kl_error=kl_error,
        agreement=float(np.concatenate(score.agree).mean()) if score.agree else None,
        accuracy=float(np.concatenate(score.right).mean()),
        changes=TokenChanges.of(before, score) if before is not None else None,
    )
