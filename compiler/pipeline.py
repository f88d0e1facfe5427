"""The whole job: load, prepare, calibrate and rewrite segment by segment, verify, save."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.compiler import ladder
from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.console.visible import visible
from qcompile.compiler.data.apart import check_apart
from qcompile.compiler.data.calibration import Calibration, Given
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.memory import give_back
from qcompile.compiler.facts.model import element_type
from qcompile.compiler.files import publish
from qcompile.compiler.files.folders import page_path, report_path
from qcompile.compiler.files.load import check_model_file, check_output_path, save_model
from qcompile.compiler.files.work import Work
from qcompile.compiler.measure import randomness
from qcompile.compiler.measure.distance import effect_of
from qcompile.compiler.measure.phases import peak_memory, phase, phases, recorded
from qcompile.compiler.measure.speed import paired
from qcompile.compiler.mixed.keep import keep
from qcompile.compiler.mixed.ranking import RankingCache
from qcompile.compiler.mixed.windows import bounding_windows, float_outputs
from qcompile.compiler.plan import bound_of, fitted, is_spent, steps_that
from qcompile.compiler.recipe import Recipe, dump_recipe
from qcompile.compiler.report.coverage import check_coverage
from qcompile.compiler.report.page import to_html
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount, TooLarge
from qcompile.compiler.settings.bound import NO_BOUND, Bound, TooFar
from qcompile.compiler.stages import (
    Walked,
    checkpoints_of,
    finish,
    gather_data,
    halve_scales,
    judged_by,
    load_statistics,
    prepare_model,
    walk,
    wish,
)
from qcompile.compiler.walk import activation_bits
from qcompile.compiler.walk.accuracy import Accuracy
from qcompile.compiler.walk.conformance import check_conformance
from qcompile.compiler.walk.level import AUTO, SHARE, Level, check_unverified, level_of, told
from qcompile.compiler.walk.saved_run import is_whole, run_saved
from qcompile.compiler.walk.verify import check_outputs, check_reloaded, silent
from qcompile.compiler.walk.verify_saved import check_saved
from qcompile.passes.activations import INT8
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.formats.lower import lower


@dataclass(frozen=True)
class Chosen:
    """What the formats of a recipe were chosen by. told: the choice, in words.

    budget: bytes that the files may take, or bits a weight. bound: how far they may be from float on data held aside.
    frontier: where the choice lies.
    """

    told: str = ""
    budget: str = ""
    bound: Bound = NO_BOUND
    frontier: Frontier | None = None


@recorded
def compile_model(
    model: Path | str,
    recipe: Recipe | None = None,
    *,
    output: Path | str | None = None,
    calibration: Given = (),
    progress: Progress | None = None,
    statistics: Path | str | None = None,
    evaluation: Given | None = None,
    bench: bool = False,
    verify: str = AUTO,
    fresh: bool = False,
    checkpoints: Path | str | None = None,
    asked: tuple[Path, Path] | None = None,
    chosen: Chosen | None = None,
) -> Report:
    """Compile the model file to `output` (with its data file and report.json beside it); everything or nothing.

    output: MODEL-int4.onnx beside the model where it is not given. calibration: files, a reader
    (`get_next`, or an iterable of dicts), or a Calibration, which has both and their settings.
    statistics: a file of `calibrate_model` that ranges are taken from, instead of a run over calibration data.
    evaluation: what the accuracy in the report is measured on, given as calibration data is; none of it may be
    calibrated on. Without it, a part of the calibration data that is left out, where there is enough of it.
    bench: run both models in turns, and report how long they take.
    verify: how much is verified, see `walk/level.py`.
    fresh: begin anew, where the same compile was interrupted and would go on behind its last checkpoint.
    checkpoints: a folder that keeps the walk through the segments when the compile has succeeded, and from which the
    same walk is taken.
    asked: the folders that the user named, where the model is of one: commands in the report say these.
    chosen: what the formats of the recipe were chosen by (`api.spending`), for the report, and for checks of the file.

    Raises UserError for bad input, for coverage below the recipe's minimum, and where verification fails; TooLarge and
    TooFar for a file that is not what was `chosen`.
    """
    (recipe, changed), progress = fitted(recipe or Recipe()), progress or Silent()
    chosen = chosen or Chosen()
    changed = (*filter(None, [chosen.told]), *changed)
    if is_spent(recipe):
        told = str(bound_of(recipe)) if recipe.budget is None else "a budget"
        raise UserError(f"{told} is spent by `qcompile MODEL.onnx` and qcompile.compile alone")
    source = Path(model)
    check_model_file(source)
    target = default_output(source, recipe) if output is None else Path(output)
    started = time.monotonic()
    progress.step("loading")
    calibration = Calibration.of(calibration)
    read = [*named(calibration.paths), *(() if statistics is None else (Path(statistics),))]
    for file in (target, report_path(target), page_path(target)):
        check_output_path(source, file, read)
    judged = None if evaluation is None else Calibration.of(evaluation)
    job = _Job(
        source,
        target,
        recipe,
        changed,
        calibration,
        None if statistics is None else Path(statistics),
        judged,
        verify,
        [str(folder) for folder in asked or ()],
        chosen,
    )
    with Work(target, fresh=fresh, shelf=None if checkpoints is None else Path(checkpoints)) as work:
        try:
            return _compiled(job, work, progress, started, bench=bench)
        except (TooLarge, TooFar):
            work.drop()  # another choice of formats follows, and nobody goes on from this one
            raise


@dataclass(frozen=True)
class _Job:
    """What `compile_model` was asked for. changed: what a target changed in the recipe. asked: folders, as named."""

    source: Path
    target: Path
    recipe: Recipe
    changed: Sequence[str]
    calibration: Calibration
    statistics: Path | None
    evaluation: Calibration | None
    verify: str
    asked: list[str]
    chosen: Chosen


def _compiled(asked: _Job, work: Work, progress: Progress, started: float, *, bench: bool) -> Report:
    """The work itself; what is finished of it is put aside in `work`."""
    source, target, recipe, statistics = asked.source, asked.target, asked.recipe, asked.statistics
    chosen = asked.chosen
    prepared = prepare_model(source, recipe, progress)
    if (drawn := chosen.frontier) is not None:
        drawn.check_source(str(source), prepared.report.source_hash)
        if (judged := asked.evaluation) is not None:
            check_apart(drawn.calibrated, judged_by(judged))
    saved = None if statistics is None else load_statistics(prepared, statistics)
    graph, plan, report, job = prepared.model, prepared.plan, prepared.report, prepared.job
    level = level_of(asked.verify, report.source_bytes, prepared.passes)
    if level == "none":
        check_unverified(recipe, asked.evaluation, bench=bench)
    data = gather_data(
        prepared,
        asked.calibration,
        saved,
        asked.evaluation,
        verified=level != "none",
        few=level == "sample" and not bench,
        measured=bench or asked.evaluation is not None or bool(recipe.mixed),
        room=work.room,
        aside=chosen.frontier is not None,
        bound=bool(chosen.bound),
    )
    report.calibrated |= {} if drawn is None else drawn.calibrated
    if chosen.bound:
        bounding_windows(plan, data, chosen.bound)
    job.share = SHARE if level == "sample" else 1
    aside = checkpoints_of(work, prepared, data, statistics, level)
    climbed = data.data_free and saved is None and data.verified
    rungs = aside.once(
        "rungs", lambda: ladder.climb(source, recipe, prepared.passes, data, progress) if climbed else []
    )
    walked = walk(prepared, data, saved, aside)
    if recipe.mixed:
        key = source, report.source_hash, recipe.to_dict(), report.versions, asked.calibration, statistics
        rankings = RankingCache(*key, judged=asked.evaluation is not None)
        with phase("sensitivity"):
            report.mixed = keep(
                graph, walked.passes, plan, data, source, wish(recipe), recipe.provider, progress, rankings
            )
            give_back()
    if recipe.target in INT8:
        taking = activation_bits.taking(graph, INT8[recipe.target])
        report.nodes = activation_bits.choose(report.nodes, recipe.activation_bits, taking)
        activation_bits.write(graph, report.nodes, recipe.activation_bits)
    verified, plan = finish(walked, progress), walked.plan
    report.ladder = ladder.finished(rungs, walked, verified)
    check_coverage(report, recipe.min_coverage, walked.passes)
    progress.step("saving")
    randomness.release(graph)
    given = activation_bits.leveled(graph)  # of the source, so the verified graph has them, too
    with phase("lower"):
        lower(graph, recipe.target)
    int8 = activation_bits.leveled(graph) - given
    halve_scales(graph, recipe)
    with publish.staging(target) as staged:
        with phase("save"):
            written = save_model(graph, staged, metadata=_metadata(report, recipe))
        report.compiled_bytes = written.model_bytes + written.data_bytes
        if chosen.budget:
            Amount.parse(chosen.budget).check(report.compiled_bytes)
        ran = _run(staged, walked, verified, int8, level, progress)
        if chosen.bound:
            chosen = replace(chosen, frontier=_bounded(chosen, walked, staged, progress))
        report.frontier = chosen.frontier and chosen.frontier.sized(report.compiled_bytes)
        check_saved(staged, graph)
        report.verified = told(level, ran=ran)
        report.target = [*asked.changed, *check_conformance(staged, recipe.target)]
        if bench:
            progress.step("running both models in turns")
            with phase("bench"):
                report.speed = paired(source, staged, plan, (*data.evaluation, *data.checks)[0], recipe.provider)
                give_back()
        report.output, report.asked = str(target), asked.asked
        report.budget, report.bound = chosen.budget, chosen.bound.settings
        report.files = [file.name for file in (*written.paths, report_path(target), page_path(target))]
        report.seconds, report.peak_memory = aside.seconds + time.monotonic() - started, peak_memory()
        report.phases = phases()
        with publish.writing(target):
            _write_report(report, staged)
        publish.publish(written.paths, target.absolute(), (report_path(staged), page_path(staged)))
    return report


@phase("bound")
def _bounded(chosen: Chosen, walked: Walked, staged: Path, progress: Progress) -> Frontier:
    """The frontier with how far the file is from the float model on what is held aside; TooFar beyond the bound."""
    assert chosen.frontier is not None
    progress.step("comparing on what is held aside")
    prepared, bound, provider = walked.prepared, chosen.bound, walked.prepared.recipe.provider
    batches, held_on = bounding_windows(prepared.plan, walked.data, bound)
    effect = effect_of(prepared.plan, float_outputs(prepared.source, prepared.plan, batches, provider))
    distance = effect.distance(run_saved(staged, walked.plan, batches, provider, prepared.job.optimize))
    size = prepared.report.compiled_bytes
    if distance > bound.distance:
        raise TooFar(f"{bound} does not hold: {effect.told(distance)} on {held_on}", distance, size)
    return chosen.frontier.with_tried(size, distance, str(bound), held_on)


def _write_report(report: Report, model: Path) -> None:
    """Beside the model file, for programs and for people."""
    report_path(model).write_text(report.to_json(), encoding="utf-8")
    page_path(model).write_text(to_html(report), encoding="utf-8")


def rewrite_report(report: Report) -> None:
    """Write the report of a compiled model anew."""
    model = Path(report.output)
    publish.write_text(report_path(model), report.to_json())
    publish.write_text(page_path(model), to_html(report))


def _run(
    staged: Path, walked: Walked, verified: Sequence[Arrays], int8: set[str], level: Level, progress: Progress
) -> str:
    """Run the saved file and judge its outputs; how it was run, in words. int8: MatMulNBits given level 4 here.

    A sample runs it for evaluation data alone: else the outputs are those of the graph in memory, which has its bytes.
    """
    job, data, plan, report = walked.prepared.job, walked.data, walked.plan, walked.report
    recipe, graph = walked.prepared.recipe, walked.model
    if level == "none":
        return ""
    accuracy, ran = Accuracy(plan, data, job.floats), level == "full" or bool(data.evaluation)
    reloaded = list(verified)
    if ran:
        progress.step("running the saved file")
        reloaded = run_saved(
            staged, plan, data.checks, recipe.provider, job.optimize, more=data.evaluation, each=accuracy.add
        )
        same = run_saved(staged, plan, data.checks, recipe.provider, job.optimize, floats=int8) if int8 else reloaded
        integer = any(Fact.INTEGER in p.ensures for p in walked.passes)
        rounding = math.inf if integer else report.rounding
        report.reload_error = check_reloaded(same, verified, element_type(graph), rounding=rounding)
    original = [original for _, original in walked.outputs]
    job.tell(plan, data, reloaded, original)
    judged = [o for o in report.outputs if o.name not in silent(reloaded, original, job.sigmoids)]
    check_outputs(judged, report.nodes, recipe.min_cosine)
    accuracy.tell(report)
    return ("in one session" if is_whole(staged) else "segment by segment") if ran else ""


def default_output(model: Path, recipe: Recipe) -> Path:
    """Where a compiled model goes that is given no name: beside the file, or beside the folder."""
    if steps_that(recipe, ensure=Fact.INTEGER):
        own = "int8"
    else:
        own = recipe.weights.name if recipe.weights is not None else f"int{recipe.bits}"
    if model.is_dir():
        named = model if model.name not in ("", "..") else model.resolve()
        return named.with_name(f"{named.name}-{own}")
    return model.with_name(f"{model.stem}-{own}{'' if model.suffix.lower() == '.gguf' else '.onnx'}")


def _metadata(report: Report, recipe: Recipe) -> dict[str, str]:
    told = " ".join(f"{name} {number}" for name, number in report.versions.items())
    return {
        "qcompile.recipe": dump_recipe(recipe),
        "qcompile.source": report.source_hash,
        "qcompile.versions": told,
        "qcompile.data": visible(report.data),  # it names files
    }
