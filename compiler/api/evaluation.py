"""How good models are, alone or against a reference: on texts, or on arrays and images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.compiler.data.calibration import data_batches
from qcompile.compiler.data.feeds import Batch, token_batches
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.tokens import Tokenizer, find_tokenizer, load_tokenizer
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores, evaluate_many, score_outputs
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.report.sizes import Sizes, model_sizes
from qcompile.passes.errors import UserError

# Called with what is being done, and how many of how many of its steps are.
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationSet:
    """What models are judged on: texts, or files of inputs (.npz, .npy, images, folders of them).

    tokenizer: its folder, by default beside one of the models. context, tokens: of a window, and of each text; None for
    all of it.
    """

    texts: Sequence[Path] = ()
    data: Sequence[Path] = ()
    tokenizer: Path | None = None
    context: int = 512
    tokens: int | None = 4096

    def __post_init__(self) -> None:
        if bool(self.texts) == bool(self.data):
            raise UserError("give either --text FILE … for a language model or --data FILE.npz … with --against")
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"--tokens must be at least 2 (or 0 for the whole text), got {self.tokens}")


@dataclass(frozen=True)
class Running:
    """How models are run to be judged; as `session` has it."""

    accuracy_level: int = 0
    provider: str = "cpu"
    kernels: str = "auto"

    def settings(self) -> dict[str, Any]:
        """By keyword."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluated:
    """Scores of a model on a text, or of one of its outputs, and the sizes of its files. text: the file, or ""."""

    scores: DecoderScores | OutputScores
    sizes: Sizes
    text: str = ""

    def row(self) -> dict[str, Any]:
        """Plain values, as in the JSON of `qcompile eval`."""
        told = {"text": self.text} if self.text else {}
        more = {"perplexity": self.scores.perplexity} if isinstance(self.scores, DecoderScores) else {}
        return {**told, **asdict(self.scores), **more, **asdict(self.sizes)}


@dataclass(frozen=True)
class Evaluation:
    """Everything of one evaluation: a row for each text and model (the reference first), or each output and model."""

    rows: Sequence[Evaluated]
    against: Path | None
    running: Running = field(default_factory=Running)


def evaluate_models(
    models: Sequence[Path],
    on: EvaluationSet,
    *,
    against: Path | None = None,
    running: Running | None = None,
    progress: Told | None = None,
) -> Evaluation:
    """Scores of all models. On texts: perplexity of decoders, and KL to the reference; else SQNR and cosine of outputs.

    Raises UserError for bad input, and where outputs are to be compared without a reference.
    """
    running, told = running or Running(), progress or (lambda what, done, total: None)
    plan = input_plan(load_model(against or models[0]))
    if on.texts and plan.logits is not None:
        rows = _on_texts(models, on, against, running, plan, told)
    elif against is None:
        if on.texts:
            plan.require_decoder()
        raise UserError("outputs are compared with a reference: give it with --against REF.onnx")
    else:
        rows = _outputs(models, on, against, running, told)
    return Evaluation(rows, against, running)


def _on_texts(
    models: Sequence[Path], on: EvaluationSet, against: Path | None, running: Running, plan: InputPlan, told: Told
) -> list[Evaluated]:
    tokenizer = _tokenizer(models, on, against)
    texts = [text_windows(text, tokenizer, plan, on.context, on.tokens) for text in on.texts]
    rows: list[Evaluated] = []
    for text, windows in zip(on.texts, texts, strict=True):

        def progress(done: int, total: int, name: str = text.name) -> None:
            told(name, done, total)

        scores = evaluate_many(against, models, windows, **running.settings(), progress=progress)
        rows += [Evaluated(score, model_sizes(Path(score.model)), str(text)) for score in scores]
    return rows


def _outputs(models: Sequence[Path], on: EvaluationSet, against: Path, running: Running, told: Told) -> list[Evaluated]:
    """SQNR and cosine of every output, on files of inputs or on the windows of texts."""

    def batches(plan: InputPlan) -> Sequence[Batch]:
        if on.data:
            return data_batches(plan, against, on.data)
        tokenizer = _tokenizer(models, on, against)
        texts = [text_windows(text, tokenizer, plan, on.context, on.tokens) for text in on.texts]
        return [batch for windows in texts for batch in token_batches(plan, windows)]

    def progress(done: int, total: int) -> None:
        told("comparing outputs", done, total)

    scores = score_outputs(against, models, batches, **running.settings(), progress=progress)
    return [Evaluated(score, model_sizes(Path(score.model))) for score in scores]


def _tokenizer(models: Sequence[Path], on: EvaluationSet, against: Path | None) -> Tokenizer:
    """The one asked for, else the first that lies beside a model."""
    places = [on.tokenizer] if on.tokenizer else [*([against] if against else []), *models]
    return load_tokenizer(next((place for place in places if find_tokenizer(place)), places[-1]))
