"""Looking at models from a program: how good they are, how fast, and what is in them."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.compiler.api.bench import Benchmark, Candidate, bench_models
from qcompile.compiler.api.data import Data, Transform, data_of
from qcompile.compiler.api.difference import diff_models
from qcompile.compiler.api.door import door
from qcompile.compiler.api.evaluation import Evaluation, EvaluationSet, Running, evaluate_models
from qcompile.compiler.api.gate import Gate
from qcompile.compiler.api.models import Model, PathLike, on_disk
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.labels import Labels
from qcompile.compiler.data.readers import array_of
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.measure.bounds import Bounds
from qcompile.compiler.measure.metric import Drop, Function, Metric
from qcompile.compiler.measure.tasks.table import named as named_tasks
from qcompile.compiler.measure.workload import Workload
from qcompile.compiler.report.difference import Difference
from qcompile.compiler.report.explanation import Explanation
from qcompile.compiler.report.explanation import explain as explain_file
from qcompile.compiler.report.inspection import Summary
from qcompile.compiler.report.inspection import inspect as inspect_file
from qcompile.passes.errors import UserError

# One model, several, or several by the names that results give them.
Models: TypeAlias = Model | Sequence[Model] | Mapping[str, Model]


@door
def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    text: PathLike | Sequence[PathLike] | None = None,
    data: Data | None = None,
    transform: Transform | None = None,
    labels: PathLike | Sequence[int] | npt.NDArray[Any] | None = None,
    metric: str | Function | None = None,
    max_kl: float | None = None,
    min_sqnr: float | None = None,
    max_drop: float | str | None = None,
    gate: PathLike | Mapping[str, Mapping[str, float]] | None = None,
    tasks: str | Sequence[str] = (),
    task_items: int = 100,
    tokenizer: PathLike | None = None,
    context: int = 512,
    tokens: int = 4096,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
) -> Evaluation:
    """How good a model is: perplexity of a decoder on text, and how far it is from a reference; as `qcompile eval`.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        against: the reference. A decoder's KL divergence, and SQNR and cosine of outputs, are measured against it.
        text: files or texts for a language model.
        data: batches instead, in every form that `compile` takes for calibration: files, arrays, a `DataLoader`.
        transform: called with each item of `data`, as in `compile`.
        labels: class numbers of the rows of `data`, or a file of them: top-1 and top-5 accuracy are told.
        metric: a score of your own, `function(inputs, outputs, labels)` or `"module:function"`: dicts of arrays, one
            for each batch, and the labels or None. More is better, unless it has an attribute `lower_is_better`.
        max_kl: raise `Verdict` where a text has more KL to the reference, nats a token.
        min_sqnr: raise `Verdict` where an output has less signal over noise, dB.
        max_drop: raise `Verdict` where the score (of `metric`, else accuracy by `labels`, else top-1 agreement) loses
            more: `"0.5%"` of the reference's, or `0.005`.
        gate: raise `Verdict` where one of its bounds is broken: a file, as `qcompile eval --gate` takes it, or what one
            holds, `{"kl_p99": {"max": 0.5}}`.
        tasks: task sets for a decoder, `"cloze,needle"` or a list; without `text` the tasks' bundled text is scored.
        task_items: of each.
        tokenizer: a folder with `tokenizer.json`, by default beside one of the models.
        context: tokens of a window.
        tokens: of each text, 0 for all of it.
        accuracy_level: what ONNX Runtime may do in 4-bit products: 0 exact, 4 int8 activations.
        provider: `"cpu"` or `"cuda"`.
        kernels: who computes qcompile's operators: `"native"`, `"portable"` or `"auto"`.

    Returns:
        A row for each text (the reference's first), or for each output.

    Raises:
        Verdict: where a bound does not hold; its `document` is the evaluation.
    """
    running = Running(accuracy_level, provider, kernels)
    bounds = _bounds(max_kl, min_sqnr, max_drop, metric)
    with _set(text, data, transform, labels, metric, tokenizer, context, tokens, (tasks, task_items)) as (on, names):
        return _judge([model], against, on, running, names, bounds, _gate(gate))


@door
def compare(
    models: Models,
    against: Model,
    *,
    text: PathLike | Sequence[PathLike] | None = None,
    data: Data | None = None,
    transform: Transform | None = None,
    labels: PathLike | Sequence[int] | npt.NDArray[Any] | None = None,
    metric: str | Function | None = None,
    max_kl: float | None = None,
    min_sqnr: float | None = None,
    max_drop: float | str | None = None,
    gate: PathLike | Mapping[str, Mapping[str, float]] | None = None,
    tasks: str | Sequence[str] = (),
    task_items: int = 100,
    tokenizer: PathLike | None = None,
    context: int = 512,
    tokens: int = 4096,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
) -> Evaluation:
    """Several models against one reference, which runs once for all of them; the other arguments are `evaluate`'s.

    Args:
        models: a list of models, or a dict of them by the names that the result gives them.
        against: the reference.
    """
    running = Running(accuracy_level, provider, kernels)
    bounds = _bounds(max_kl, min_sqnr, max_drop, metric)
    with _set(text, data, transform, labels, metric, tokenizer, context, tokens, (tasks, task_items)) as (on, names):
        return _judge(models, against, on, running, names, bounds, _gate(gate))


@door
def bench(
    models: Models,
    *,
    prompt_tokens: Sequence[int] = (1, 64, 512),
    decode: int = 64,
    decode_after: int = 64,
    threads: int | Sequence[int] = (),
    rounds: int = 5,
    kernels: str = "auto",
    accuracy_level: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Benchmark:
    """How fast models are here, and what memory they take; each in a process of its own, in turns; as `qcompile bench`.

    Args:
        models: one, a list, or a dict by the names that the result gives them. Ratios are to the first.
        prompt_tokens: lengths of prefills.
        decode: decoding steps; 0 for none.
        decode_after: tokens before them.
        threads: one number or several; all cores by default.
        rounds: turns of each model.
        kernels: who computes qcompile's operators, as in `evaluate`.
        accuracy_level: of portable bodies, as in `evaluate`.
        shapes: of inputs that are not made of tokens and whose sizes are free.
    """
    workload = Workload(
        tuple(prompt_tokens), decode, decode_after, {name: tuple(shape) for name, shape in (shapes or {}).items()}
    )
    counts = (threads,) if isinstance(threads, int) else tuple(threads)
    with _on_disk(models) as files:
        candidates = [Candidate(name, path, kernels, accuracy_level) for name, path in files.items()]
        return bench_models(candidates, workload, threads=counts, rounds=rounds)


@door
def inspect(model: Model, *, every: bool = False) -> Summary:
    """What is in a model: types, sizes, which weights are quantized and which are not; as `qcompile inspect`.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        every: each weight by itself instead of alike ones together.
    """
    with on_disk(model) as path:
        return inspect_file(path, every=every)


@door
def explain(model: PathLike, *nodes: str, worst: int | None = None) -> Explanation:
    """Why nodes of a compiled model got what they got: decisions, candidates, errors; as `qcompile explain`.

    Args:
        model: the compiled file, whose report lies beside it, or its folder.
        nodes: names of nodes or of weights; * is for any letters. All without any.
        worst: of these the ones of largest error.
    """
    return explain_file(model_file(Path(model)), nodes, worst)


@door
def diff(
    a: Model,
    b: Model,
    *,
    worst: int | None = None,
    text: PathLike | Sequence[PathLike] | None = None,
    data: Data | None = None,
    transform: Transform | None = None,
    tokenizer: PathLike | None = None,
    context: int = 512,
    tokens: int = 4096,
) -> Difference:
    """What differs from one model to another: formats, bytes and errors of weights, recipes; as `qcompile diff`.

    Args:
        a: the first one, float or compiled.
        b: the second one.
        worst: print so many nodes alone, those whose errors grew most, by the reports beside both.
        text: files or texts, as in `evaluate`: KL of b against a, and errors behind layers, are told.
        data: batches instead.
        transform: as in `evaluate`.
        tokenizer: a folder with `tokenizer.json`, by default beside one of the models.
        context: tokens of a window.
        tokens: of each text, 0 for all of it.
    """
    with ExitStack() as stack:
        first, second = (stack.enter_context(on_disk(model)) for model in (a, b))
        on = None
        if text is not None or data is not None:
            on, _ = stack.enter_context(_set(text, data, transform, None, None, tokenizer, context, tokens, ((), 1)))
        return diff_models(first, second, worst=worst, on=on)


def _bounds(
    max_kl: float | None, min_sqnr: float | None, max_drop: float | str | None, metric: str | Function | None
) -> Bounds:
    lower = metric is not None and Metric(metric).lower_is_better
    return Bounds(min_sqnr, max_kl, Drop(str(max_drop)) if max_drop is not None else None, lower)


def _gate(given: PathLike | Mapping[str, Mapping[str, float]] | None) -> Gate | None:
    if given is None or isinstance(given, Mapping):
        return Gate.of(given) if given is not None else None
    return Gate.read(Path(given))


def _judge(
    models: Models,
    against: Model | None,
    on: EvaluationSet,
    running: Running,
    names: Mapping[str, str],
    bounds: Bounds,
    gate: Gate | None,
) -> Evaluation:
    """The scores, with the names that models and texts were given; Verdict where a bound is broken. names: of texts."""
    with ExitStack() as stack:
        files = stack.enter_context(_on_disk(models))
        known = {str(path): name for name, path in files.items()}
        reference = stack.enter_context(on_disk(against)) if against is not None else None
        if reference is not None:
            known[str(reference)] = str(os.fspath(against)) if isinstance(against, (str, os.PathLike)) else "reference"
        made = evaluate_models(list(files.values()), on, against=reference, running=running, bounds=bounds, gate=gate)
    told = replace(
        made,
        rows=[row.renamed({**known, **names}) for row in made.rows],
        tasks=[replace(own, model=known.get(own.model, own.model)) for own in made.tasks],
    )
    told = told.gated(gate) if gate is not None else told
    told.check(bounds)
    return told


@contextmanager
def _set(
    text: PathLike | Sequence[PathLike] | None,
    data: Data | None,
    transform: Transform | None,
    labels: PathLike | Sequence[int] | npt.NDArray[Any] | None,
    metric: str | Function | None,
    tokenizer: PathLike | None,
    context: int,
    tokens: int,
    tasks: tuple[str | Sequence[str], int],
) -> Iterator[tuple[EvaluationSet, dict[str, str]]]:
    """What to judge on, and the names of texts that lie in temporary files."""
    names, count = named_tasks(tasks[0]) if tasks[0] else (), tasks[1]
    if (text is None) == (data is None) and not (names and data is None):
        raise UserError("give either text= (files or texts) for a language model, or data= (files, arrays, batches)")
    own = Path(tokenizer) if tokenizer is not None else None
    classes = _classes(labels)
    if data is not None:
        batches = data_of(data, transform=transform, tokenizer=tokenizer)
        yield EvaluationSet(data=batches, labels=classes, metric=metric, tasks=names), {}
        return
    with _texts(text) as (texts, told):
        settings = (Calibration(), own, context, tokens or None, classes, metric)
        yield EvaluationSet(texts, *settings, names, count), told


def _classes(labels: PathLike | Sequence[int] | npt.NDArray[Any] | None) -> Path | Labels | None:
    """Labels as they come, of torch too; UserError for what are no class numbers."""
    if labels is None or isinstance(labels, (str, os.PathLike)):
        return Path(labels) if labels is not None else None
    array = array_of(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"labels are class numbers, one a row, got {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


@contextmanager
def _on_disk(models: Models) -> Iterator[dict[str, Path]]:
    """Files by the names that results give them: a path, "model 1", …; or the keys."""
    with ExitStack() as stack:
        if isinstance(models, Mapping):
            yield {str(name): stack.enter_context(on_disk(model)) for name, model in models.items()}
            return
        several = list(models) if isinstance(models, (list, tuple)) else [models]
        if not several:
            raise UserError("give at least one model")
        found: dict[str, Path] = {}
        for number, model in enumerate(several, 1):
            name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else f"model {number}"
            found[str(name)] = stack.enter_context(on_disk(model))
        yield found


@contextmanager
def _texts(given: PathLike | Sequence[PathLike] | None) -> Iterator[tuple[list[Path], dict[str, str]]]:
    """Files of texts, texts in memory as temporary ones; and the names that results give those. None for none."""
    words = data_of(given)
    if not words.texts:
        yield [Path(file) for file in words.files], {}
        return
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        paths = [Path(folder) / f"text {number}" for number in range(1, len(words.texts) + 1)]
        for path, text in zip(paths, words.texts, strict=True):
            path.write_text(text, encoding="utf-8")
        yield paths, {str(path): f"text {number}" for number, path in enumerate(paths, 1)}
