"""Compiling, calibrating, ranking and sweeping from a program."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from qcompile.compiler.api.calibrate import Calibrated, calibrate_model
from qcompile.compiler.api.data import Data, Transform, data_of, gives_items
from qcompile.compiler.api.door import door
from qcompile.compiler.api.fields import Fields
from qcompile.compiler.api.folders import check_folder, copy_companions, exported, home, within
from qcompile.compiler.api.idle import warn
from qcompile.compiler.api.models import Model, PathLike, is_file, on_disk
from qcompile.compiler.api.recipes import Passes, plain_of, recipe_of
from qcompile.compiler.api.rehearsal import Rehearsal, rehearse
from qcompile.compiler.api.sensitivity import rank_nodes
from qcompile.compiler.api.spending import Spent, asked_for, planned, spending
from qcompile.compiler.api.timing import time_products
from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.console.terminal import Bar
from qcompile.compiler.files import finished
from qcompile.compiler.files.folders import is_checkpoint, model_file
from qcompile.compiler.mixed.ranking import Ranking
from qcompile.compiler.pipeline import compile_model, default_output
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.report import Report
from qcompile.compiler.results.timings import Timings
from qcompile.compiler.sweep.rows import Sweep
from qcompile.compiler.sweep.run import sweep as run_sweep
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.passes import lists
from qcompile.passes.errors import UserError
from qcompile.runtime.cluster import clustered


@door
def compile(
    model: Model,
    passes: Passes | None = None,
    *,
    output: PathLike | None = None,
    calibration: Data | None = None,
    transform: Transform | None = None,
    tokenizer: PathLike | None = None,
    recipe: Recipe | PathLike | None = None,
    budget_file: PathLike | None = None,
    point: int | None = None,
    for_machine: PathLike | None = None,
    statistics: PathLike | None = None,
    evaluation: Data | None = None,
    bench: bool = False,
    verify: str = "auto",
    fresh: bool = False,
    checkpoints: PathLike | None = None,
    cluster: str | None = None,
    progress: Progress | bool = False,
    **fields: Unpack[Fields],
) -> Report:
    """Quantize a model, and write the result with its report; the same as `qcompile MODEL.onnx`.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`; it is left as it is. A folder with a model in
            it, a Hugging Face folder or a `.gguf` file (which are exported first) become a folder.
        passes: an ordered list such as `"smooth,awq,pack"`; without it the recipe's, or the best known list.
        output: the file to write, or a folder for it with tokenizer and configuration beside; `MODEL-int4.onnx` beside
            the model by default, or `FOLDER-int4`. A model in memory needs one.
        calibration: files or texts (one, or a list), one batch (a dict by input name, or an array), or whatever gives
            batches or texts: a list, a generator, a torch `DataLoader`, a reader with `get_next`. Without it, bundled
            text where there is a tokenizer, else what the model itself generates.
        transform: called with each item of `calibration` and `evaluation`; gives a batch or a text.
            `lambda batch: batch[0]` drops the labels of a `DataLoader`.
        tokenizer: a folder with `tokenizer.json`, by default the model's own.
        recipe: settings, as a `Recipe` or a file of them; `passes` and `fields` stand before them.
        budget_file: the report of an earlier compile with a budget or a bound, of this model and target: a point of its
            frontier is compiled, with the settings of that compile.
        point: which one, as the report numbers them.
        for_machine: times of products that `qcompile timings` measured on another machine, for the choice of formats
            with a budget or a bound.
        statistics: ranges of activations that `calibrate` saved, instead of a run over calibration data.
        evaluation: what the accuracy in the report is measured on, in every form that `calibration` takes; none of it
            may be calibrated on. By default rows of the calibration data that are left out, where there are enough.
        bench: run both models in turns for a few seconds, and report how fast they are.
        verify: `"full"`, `"sample"` (an eighth of each packed product's columns) or `"none"`; by default full, but
            a sample of models of more than 2 GB where nothing is calibrated.
        fresh: start over, where the same compile was interrupted and would go on behind its last checkpoint.
        checkpoints: a folder that keeps the finished segments, as large as the output and more: another compile with it
            begins behind them where only what follows is new: `attention`, `caches`, `fuse`, how many nodes stay float.
        cluster: `"auto"`, or `"HOST:PORT"` of a Ray cluster, whose machines compute, for the same bytes
            (docs/cluster.md). A Ray that runs in this process is used as it is.
        progress: True shows on stderr what is going on; or an object that is told.
        **fields: settings of a recipe by their keys: `bits=8`, `group_size=64`, `target="qdq"`, `exclude=["*head*"]`.

    Returns:
        What was done: prints as a short table; `to_dict()`, `to_dataframe()`.

    Raises:
        UserError: for bad input and for results that are refused, in one line. No output is written then; of
            what a long compile had finished a note says where the same call goes on.
    """
    if output is None and not is_file(model):
        raise UserError("a model in memory has no folder of its own: name the file to write with output=")
    if checkpoints is not None:
        finished.check(Path(checkpoints))
    wanted, frontier = asked_for(
        Path(budget_file) if budget_file is not None else None,
        point,
        plain_of(passes, fields),
        recipe,
        lambda: recipe_of(recipe, passes, fields),
    )
    judged = evaluation is not None and gives_items(evaluation)
    given = data_of(
        calibration, transform=transform if gives_items(calibration) or not judged else None, tokenizer=tokenizer
    )
    warn(wanted, given, fields, point=frontier is not None)
    other = data_of(evaluation, transform=transform if judged else None) if evaluation is not None else None
    with clustered(cluster), _graph(model, output, wanted, progress) as (path, target, asked, bar):

        def run(made: Spent) -> Report:
            return compile_model(
                path,
                made.recipe,
                chosen=made.chosen,
                output=target,
                calibration=made.calibration,
                statistics=Path(statistics) if statistics is not None else None,
                evaluation=made.evaluation,
                bench=bench,
                verify=verify,
                fresh=fresh,
                checkpoints=None if checkpoints is None else Path(checkpoints),
                asked=asked,
                progress=bar,
            )

        return spending(
            path,
            wanted,
            given,
            bar,
            run,
            evaluation=other,
            point=frontier,
            machine=None if for_machine is None else Path(for_machine),
        )


@door
def dry_run(
    model: Model,
    passes: Passes | None = None,
    *,
    calibration: Data | None = None,
    transform: Transform | None = None,
    tokenizer: PathLike | None = None,
    recipe: Recipe | PathLike | None = None,
    budget_file: PathLike | None = None,
    point: int | None = None,
    for_machine: PathLike | None = None,
    progress: Progress | bool = False,
    **fields: Unpack[Fields],
) -> Rehearsal:
    """What `compile` would make of every weight, how large the result would be, and what memory it would take.

    No data is needed, no weights are read, and nothing is written; as `qcompile MODEL.onnx --dry-run`. But for a
    budget or a bound, by which formats are chosen as `compile` does first, and the `frontier` is told; and for a point,
    whose model is known by its hash. A Hugging Face folder or a `.gguf` file is exported first, since its graph
    decides, and kept: `compile` finds the export. The arguments are those of `compile`.
    """
    wanted, drawn = asked_for(
        Path(budget_file) if budget_file is not None else None,
        point,
        plain_of(passes, fields),
        recipe,
        lambda: recipe_of(recipe, passes, fields),
    )
    data, own = data_of(calibration, transform=transform, tokenizer=tokenizer), Path(model) if is_file(model) else None  # type: ignore[arg-type]
    with _told(progress) as bar, ExitStack() as stack:
        if own is not None and (own.is_dir() or is_checkpoint(own)):
            path = model_file(exported(own, bar.step))
        else:
            path = stack.enter_context(on_disk(model))
        machine = None if for_machine is None else Path(for_machine)
        made, frontier = planned(path, wanted, data, bar, point=drawn, machine=machine)
        return replace(rehearse(path, made), frontier=frontier)


@door
def calibrate(
    model: Model,
    passes: Passes | None = None,
    *,
    output: PathLike,
    calibration: Data | None = None,
    transform: Transform | None = None,
    tokenizer: PathLike | None = None,
    recipe: Recipe | PathLike | None = None,
    progress: Progress | bool = False,
    **fields: Unpack[Fields],
) -> Calibrated:
    """Save the ranges of a model's activations once, for many compiles with `statistics=`; as `qcompile calibrate`.

    The arguments are those of `compile`; `passes` is `smooth,qdq` by default.
    """
    wanted = recipe_of(recipe, passes, fields, lists.INTEGER)
    given = data_of(calibration, transform=transform, tokenizer=tokenizer)
    warn(wanted, given, fields)
    with on_disk(model) as path, _told(progress) as bar:
        return calibrate_model(path, wanted, output=Path(output), calibration=given, progress=bar)


@door
def sensitivity(
    model: Model,
    passes: Passes | None = None,
    *,
    calibration: Data | None = None,
    transform: Transform | None = None,
    tokenizer: PathLike | None = None,
    recipe: Recipe | PathLike | None = None,
    cluster: str | None = None,
    progress: Progress | bool = False,
    **fields: Unpack[Fields],
) -> Ranking:
    """Which integer nodes change the output most, each alone; as `qcompile sensitivity`.

    The arguments are those of `compile`; `passes` is `smooth,qdq` by default. `compile(…, keep_worst=N)` leaves the
    first N nodes in float.
    """
    wanted = recipe_of(recipe, passes, fields, lists.INTEGER)
    given = data_of(calibration, transform=transform, tokenizer=tokenizer)
    warn(wanted, given, fields)
    with clustered(cluster), on_disk(model) as path, _told(progress) as bar:
        return rank_nodes(path, wanted, calibration=given, progress=bar)


@door
def sweep(
    model: Model,
    grid: Mapping[str, Sequence[Any]],
    *,
    output: PathLike,
    recipe: Recipe | PathLike | None = None,
    calibration: PathLike | Sequence[PathLike] = (),
    tokenizer: PathLike | None = None,
    text: PathLike | Sequence[PathLike] = (),
    data: Sequence[PathLike] = (),
    context: int = 512,
    tokens: int = 2048,
    kernels: str = "auto",
    provider: str = "cpu",
    limit: int | None = None,
    keep_models: bool = False,
    note: str = "",
    cluster: str | None = None,
) -> Sweep:
    """Compile under every combination of settings, and score each; as `qcompile sweep` (docs/sweep.md).

    Args:
        model: as in `compile`.
        grid: values by key of a recipe: `{"bits": [4, 8], "passes": ["pack", "smooth,awq,pack"]}`.
        output: the folder for tables, plots and the cache: what is finished there is not run again.
        recipe: settings that are not in the grid.
        calibration: files for every combination, and `"general"`, the bundled text. As values of the grid:
            `{"calibration": ["general", "code.txt", ["general", "code.txt"]]}`.
        tokenizer: as in `compile`.
        text: what decoders are scored on, one or several; by default `"general"`, the end of the bundled text.
        data: files of arrays or images to score on, instead.
        context: tokens of a window.
        tokens: of each text, 0 for all of it.
        kernels: who computes qcompile's operators; as in `session`.
        provider: where models are scored.
        limit: run so many combinations at most.
        keep_models: keep what is compiled.
        note: joins the caption.
        cluster: as in `compile`; a row is a task.
    """
    files, texts = (
        [own] if isinstance(own, str) or not isinstance(own, Sequence) else own for own in (calibration, text)
    )
    scored = Evaluation([*map(Path, texts)], [*map(Path, data)], context, tokens, kernels, provider)
    with clustered(cluster), on_disk(model) as path:
        return run_sweep(
            path,
            grid,
            output=Path(output),
            recipe=recipe_of(recipe, None, {}),
            calibration=[str(file) for file in files],
            tokenizer=Path(tokenizer) if tokenizer is not None else None,
            evaluation=scored,
            limit=limit,
            keep_models=keep_models,
            note=note,
        )


@door
def timings(
    model: Model,
    passes: Passes | None = None,
    *,
    recipe: Recipe | PathLike | None = None,
    progress: Progress | bool = False,
    **fields: Unpack[Fields],
) -> Timings:
    """How long each product of a model takes here, float and in each format that a budget chooses from; as `qcompile
    timings`. What `to_json()` gives is a file for `compile(…, for_machine=…)` on another machine.

    The arguments are those of `compile`: the target decides what is timed, and what the recipe says of formats.
    """
    wanted = recipe_of(recipe, passes, fields)
    with on_disk(model) as path, _told(progress) as bar:
        return time_products(path, wanted, progress=bar)


@contextmanager
def _told(progress: Progress | bool) -> Iterator[Progress]:
    """Who is told how a job goes on."""
    if progress is True:
        with Bar() as bar:
            yield bar
    else:
        yield progress or Silent()


@contextmanager
def _graph(
    model: Model, output: PathLike | None, recipe: Recipe, progress: Progress | bool
) -> Iterator[tuple[Path, Path | None, tuple[Path, Path] | None, Progress]]:
    """(the graph to compile, the file to write, folders as they are named, who is told): folders in, folders out, as
    on the command line.

    What lies beside the graph is copied into an output folder behind the work, where no files of something else are.
    """
    own = Path(model) if is_file(model) else None  # type: ignore[arg-type]
    with _told(progress) as bar, ExitStack() as stack:
        if own is not None and (own.is_dir() or is_checkpoint(own)):
            source, folder = exported(own, bar.step), Path(output or default_output(own, recipe))
            check_folder(source, folder)
            graph, asked = model_file(source), (own, folder)
        else:
            asked = None
            graph = stack.enter_context(on_disk(model))
            if output is None or not within(output):
                yield graph, Path(output) if output is not None else None, asked, bar
                return
            folder = Path(output)
        yield graph, folder / (graph.name if own is not None else "model.onnx"), asked, bar
        copy_companions(home(graph), folder)
