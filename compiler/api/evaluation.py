"""How good models are, alone or against a reference: on texts, or on arrays and images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompile.compiler.api.gate import Gate, Kept, broken
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.visible import told_apart
from qcompile.compiler.data.apart import calibrated_on, check_apart, digests
from qcompile.compiler.data.calibration import Calibration, data_batches
from qcompile.compiler.data.calibration_files import Files, named
from qcompile.compiler.data.feeds import Batch, token_batches
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.labels import Labels, read_labels
from qcompile.compiler.data.tokens import Ids, Tokenizer, find_tokenizer, load_tokenizer
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.bounds import Bounds
from qcompile.compiler.measure.evaluate import (
    DecoderScores,
    OutputScores,
    decoder_scores,
    score_outputs,
    score_tokens,
)
from qcompile.compiler.measure.loaded import Subject, text_windows
from qcompile.compiler.measure.metric import Function, Metric
from qcompile.compiler.measure.metrics import TokenScores
from qcompile.compiler.measure.tasks.items import Item
from qcompile.compiler.measure.tasks.scoring import TaskScores, check_fit, score_tasks
from qcompile.compiler.measure.tasks.table import TASKS
from qcompile.compiler.report.sizes import Sizes, model_sizes
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.models.text import tasks_path
from qcompile.passes.errors import UserError, Verdict
from qcompile.runtime.sessions import operator_kernels

# Called with what is being done, and how many of how many of its steps are.
Told = Callable[[str, int, int], None]
# The text of rows over several texts together.
ALL_TEXTS = "all texts"


@dataclass(frozen=True)
class EvaluationSet:
    """What models are judged on: texts, or batches: files (.npz, .npy, images, folders of them) or a program's.

    tokenizer: its folder, by default beside one of the models. context, tokens: of a window, and of each text; None for
    all of it. labels: class numbers, one for each row of the data, or a file of them (`read_labels`). metric: a score
    of the user's own, a function or module:function (`Metric`). tasks: names of task sets for decoders, of task_items
    items each; with them and nothing else, the text is the bundled one that they are made of.
    """

    texts: Sequence[Path] = ()
    data: Calibration = field(default_factory=Calibration)
    tokenizer: Path | None = None
    context: int = 512
    tokens: int | None = 4096
    labels: Path | Labels | None = None
    metric: str | Function | None = None
    tasks: Sequence[str] = ()
    task_items: int = 100

    def __post_init__(self) -> None:
        if self.tasks and self.has_data:
            raise UserError("--tasks are for decoders on text, and --data is for other models: give one of both")
        if self.task_items < 1:
            raise UserError(f"--task-items must be at least 1, got {self.task_items}")
        if self.tasks and not self.texts:
            object.__setattr__(self, "texts", (tasks_path(),))
        if bool(self.texts) == self.has_data:
            raise UserError("give either --text FILE … for a language model or --data FILE.npz … with --against")
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"--tokens must be at least 2 (or 0 for the whole text), got {self.tokens}")

    @property
    def has_data(self) -> bool:
        """Whether there are batches, not texts."""
        return bool(self.data.words) or self.data.reader is not None

    def given_labels(self) -> Labels | None:
        """The labels, by the names of images where they have some."""
        if not isinstance(self.labels, Path):
            return self.labels
        images = Files.of(self.data.files).images if self.data.files else ()
        return read_labels(self.labels, [str(path) for path in images])

    def check_apart(self, models: Sequence[Path]) -> None:
        """Raise UserError for a file or text that a model was calibrated on, by the report beside it."""
        scored: dict[str, str] | None = None
        for model in models:
            if calibrated := calibrated_on(model):
                files = [*self.texts, *named(self.data.files), *([tasks_path()] if self.tasks else [])]
                scored = scored or digests(map(Path, files), self.data.texts)
                check_apart(calibrated, scored, str(model))


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
    """Scores of a model on a text, or of one of its outputs, and the sizes of its files.

    text: the file, ALL_TEXTS for several together, or "".
    """

    scores: DecoderScores | OutputScores
    sizes: Sizes
    text: str = ""

    def renamed(self, names: Mapping[str, str]) -> "Evaluated":
        """The same with other names of model and text, where there are some."""
        model = names.get(self.scores.model, self.scores.model)
        return Evaluated(replace(self.scores, model=model), self.sizes, names.get(self.text, self.text))

    @property
    def of_reference(self) -> bool:
        """Whether it is a decoder that others are compared with, or that no other is."""
        return isinstance(self.scores, DecoderScores) and self.scores.changes is None

    def row(self) -> dict[str, Any]:
        """Plain values, as in the JSON of `qcompile eval`."""
        told = {"text": self.text} if self.text else {}
        plain = asdict(self.scores)
        changes = plain.pop("changes", None) or {}
        more = {"perplexity": self.scores.perplexity} if isinstance(self.scores, DecoderScores) else {}
        return {**told, **plain, **changes, **more, **asdict(self.sizes)}


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Everything of one evaluation: a row for each text and model (the reference first), or each output and model.

    Several texts have rows over all of them behind their own. tasks: scores of each task and model. kept: bounds of a
    gate, and whether they hold.
    """

    rows: Sequence[Evaluated]
    against: Path | None
    running: Running = field(default_factory=Running)
    tasks: Sequence[TaskScores] = ()
    kept: Sequence[Kept] = ()

    def gated(self, gate: Gate) -> "Evaluation":
        """The same with what became of the bounds of a gate; UserError for a figure that it has not."""
        judged = [own.row() for own in self.rows if self.against is None or not own.of_reference]
        tasks = [task_row(own) for own in self.tasks if self.against is None or own.paired is not None]
        return replace(self, kept=gate.kept([*judged, *tasks]))

    def check(self, bounds: Bounds) -> None:
        """Raise Verdict where a bound is broken; rows over several texts say nothing that those of each do not."""
        told = []
        try:
            bounds.check([own.scores for own in self.rows if own.text != ALL_TEXTS])
        except Verdict as error:
            told.append(str(error))
        told += filter(None, [broken(self.kept)])
        if told:
            raise Verdict("; ".join(told), self)

    def records(self) -> list[dict[str, Any]]:
        """A dict for each row, as in the JSON of `qcompile eval`."""
        return [own.row() for own in self.rows]

    def document(self) -> list[dict[str, Any]]:
        """The JSON of `qcompile eval`: the rows, those of tasks, and the bounds of a gate."""
        return [*self.records(), *map(task_row, self.tasks), *map(asdict, self.kept)]

    def to_dict(self) -> dict[str, Any]:
        """The rows, those of tasks, the bounds of a gate, and how the models were run."""
        against = str(self.against) if self.against is not None else None
        tasks = {"tasks": list(map(task_row, self.tasks))} if self.tasks else {}
        gate = {"gate": list(map(asdict, self.kept))} if self.kept else {}
        return {"rows": self.records(), **tasks, **gate, "against": against, **self.running.settings()}

    def sheet(self) -> Sheet:
        """A line for each row, and for each task."""
        by = operator_kernels(self.running.kernels, self.running.provider)
        first = self.rows[0].scores
        if isinstance(first, OutputScores):
            heads = ("model", "output", "size", "SQNR dB", "cosine", "values")
            notes = [told for own in self.rows for told in _told(own.scores)]
            return Sheet(
                f"outputs; {by}", heads, [_output_cells(own) for own in self.rows], 4, list(dict.fromkeys(notes))
            )
        heads = ("text", "model", "size", "perplexity", "KL to reference", "same top-1")
        title = f"{first.windows} windows of {first.context} tokens, {first.scored} scored; {by}"
        notes = [f"task {own.task}, {own.model}: {own.told()}" for own in self.tasks]
        names = told_apart(own.text for own in self.rows)
        return Sheet(title, heads, [_text_cells(own, names[own.text]) for own in self.rows], 4, notes)


def _told(score: DecoderScores | OutputScores) -> Iterator[str]:
    """Of an output that scores classes, and of a metric of the user's, in a line each."""
    if isinstance(score, OutputScores) and score.classes is not None:
        yield f"{score.model}, {score.output}: {score.classes.told()}"
    if isinstance(score, OutputScores) and score.metric is not None:
        yield f"{score.model}: metric {score.reference_metric:.6g} → {score.metric:.6g}"


def _output_cells(own: Evaluated) -> list[str]:
    score = own.scores
    assert isinstance(score, OutputScores)
    size = megabytes(own.sizes.file_bytes)
    return [score.model, score.output, size, f"{score.sqnr:.2f}", f"{score.cosine:.6f}", str(score.values)]


def _text_cells(own: Evaluated, name: str) -> list[str]:
    score = own.scores
    assert isinstance(score, DecoderScores)
    kl = "" if score.kl is None else f"{score.kl:.5f} ± {score.kl_error:.5f}"
    agreement = "" if score.agreement is None else f"{score.agreement:.2%}"
    size = megabytes(own.sizes.file_bytes)
    return [name, score.model, size, f"{score.perplexity:.4f}", kl, agreement]


def evaluate_models(
    models: Sequence[Path],
    on: EvaluationSet,
    *,
    against: Path | None = None,
    running: Running | None = None,
    progress: Told | None = None,
    bounds: Bounds | None = None,
    gate: Gate | None = None,
) -> Evaluation:
    """Scores of all models. On texts: perplexity of decoders, and KL to the reference; else SQNR and cosine of outputs.

    bounds, gate: that the caller checks; those that such scores cannot have are refused before the work.
    Raises UserError for bad input, and where outputs are to be compared without a reference.
    """
    running, told, tasks = running or Running(), progress or (lambda what, done, total: None), list[TaskScores]()
    if bounds is not None:
        bounds.check_asked(texts=bool(on.texts), against=against is not None)
    on.check_apart([*([against] if against is not None else []), *models])
    plan = input_plan(load_model(against or models[0]))
    if gate is not None:
        decoder = bool(on.texts) and plan.logits is not None
        labels, metric = on.labels is not None, on.metric is not None
        gate.check_asked(decoder=decoder, against=against is not None, tasks=on.tasks, labels=labels, metric=metric)
    if on.tasks:
        plan.require_decoder()
    if on.texts and plan.logits is not None and (on.labels is not None or on.metric is not None):
        raise UserError("--labels and --metric are for outputs on --data: a decoder on --text has KL and perplexity")
    if on.texts and plan.logits is not None:
        if bounds is not None:
            bounds.check_decoder()
        tokenizer = tokenizer_of(models, on, against)
        items = _items(on, plan, tokenizer)
        windows = [text_windows(text, tokenizer, plan, on.context, on.tokens) for text in on.texts]
        paths = [*([against] if against is not None else []), *models]
        subjects = [Subject(path, **running.settings()) for path in paths]
        rows = _on_texts(subjects, on.texts, windows, running, told, compared=against is not None)
        tasks = score_tasks(subjects, items, tokenizer, compared=against is not None, progress=told)
    elif against is None:
        if on.texts:
            plan.require_decoder()
        raise UserError("outputs are compared with a reference: give it with --against REF.onnx")
    else:
        rows = _outputs(models, on, against, running, told)
    return Evaluation(rows, against, running, tasks)


def task_row(own: TaskScores) -> dict[str, Any]:
    """A task's scores as plain values, as in the JSON of `qcompile eval`."""
    plain = asdict(own)
    paired = plain.pop("paired") or {}
    return {"task": own.task, **plain, **{name: value for name, value in paired.items() if name != "count"}}


def _items(on: EvaluationSet, plan: InputPlan, tokenizer: Tokenizer) -> dict[str, list[Item]]:
    """The items of the tasks that are asked for: made before the work, for a package may be missing."""
    if on.tasks:
        tokenizer.check_vocabulary(plan.vocabulary)
    fixed = plan.sequence if plan.sequence and not plan.past else None
    items = {name: TASKS[name](on.task_items, tokenizer, fixed or on.context) for name in on.tasks}
    for name, own in items.items():
        if not own:
            raise UserError(f"task {name}: there are no items here: leave it out")
        if fixed:
            check_fit(name, own, tokenizer, fixed)
    return items


def _on_texts(
    subjects: Sequence[Subject],
    files: Sequence[Path],
    texts: Sequence[Sequence[Ids]],
    running: Running,
    told: Told,
    *,
    compared: bool,
) -> list[Evaluated]:
    """texts: the windows of each file. compared: the first subject is the others' reference."""
    sizes = [model_sizes(subject.path) for subject in subjects]
    together = [TokenScores() for _ in subjects]
    rows, names = list[Evaluated](), told_apart(map(str, files))

    def scored(scores: Sequence[TokenScores], windows: Sequence[Ids], text: str) -> None:
        found = decoder_scores(subjects, scores, windows, running.accuracy_level, compared=compared)
        rows.extend(Evaluated(score, size, text) for score, size in zip(found, sizes, strict=True))

    for text, windows in zip(files, texts, strict=True):

        def progress(done: int, total: int, name: str = names[str(text)]) -> None:
            told(name, done, total)

        scores = score_tokens(subjects, windows, compared=compared, progress=progress)
        scored(scores, windows, str(text))
        for own, score in zip(together, scores, strict=True):
            own.extend(score)
    if len(texts) > 1:
        scored(together, [window for windows in texts for window in windows], ALL_TEXTS)
    return rows


def _outputs(models: Sequence[Path], on: EvaluationSet, against: Path, running: Running, told: Told) -> list[Evaluated]:
    """SQNR and cosine of every output, on files of inputs or on the windows of texts."""

    def batches(plan: InputPlan) -> Sequence[Batch]:
        if on.has_data:
            return data_batches(plan, against, on.data)
        tokenizer = tokenizer_of(models, on, against)
        texts = [text_windows(text, tokenizer, plan, on.context, on.tokens) for text in on.texts]
        return [batch for windows in texts for batch in token_batches(plan, windows)]

    def progress(done: int, total: int) -> None:
        told("comparing outputs", done, total)

    metric = Metric(on.metric) if on.metric is not None else None
    labels = on.given_labels()
    scores = score_outputs(
        against, models, batches, **running.settings(), progress=progress, labels=labels, metric=metric
    )
    return [Evaluated(score, model_sizes(Path(score.model))) for score in scores]


def tokenizer_of(models: Sequence[Path], on: EvaluationSet, against: Path | None) -> Tokenizer:
    """The one asked for, else the first that lies beside a model."""
    places = [on.tokenizer] if on.tokenizer else [*([against] if against else []), *models]
    return load_tokenizer(next((place for place in places if find_tokenizer(place)), places[-1]))
