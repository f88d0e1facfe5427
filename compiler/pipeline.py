"""The whole job: load, prepare, calibrate and rewrite segment by segment, verify, save."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.compiler import ladder
from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.console.visible import visible
from qcompile.compiler.data.calibration import Calibration, Given
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.model import element_type
from qcompile.compiler.files import finished, publish
from qcompile.compiler.files.load import check_model_file, check_output_path, save_model
from qcompile.compiler.files.work import Work
from qcompile.compiler.measure import randomness
from qcompile.compiler.measure.phases import peak_memory, phase, phases, recorded
from qcompile.compiler.measure.speed import paired
from qcompile.compiler.mixed.keep import keep
from qcompile.compiler.mixed.ranking import RankingCache
from qcompile.compiler.plan import fitted, steps_that
from qcompile.compiler.recipe import Recipe, dump_recipe
from qcompile.compiler.report.coverage import check_coverage
from qcompile.compiler.report.page import to_html
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.stages import (
    Walked,
    checkpoints_of,
    finish,
    gather_data,
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
from qcompile.passes.formats.half_scales import HALF_SCALES, halve
from qcompile.passes.formats.lower import lower
from qcompile.passes.targets import TARGETS


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
    told: str = "",
    budget: str = "",
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
    told: what was chosen in the recipe, in words; a budget must be spent by then (`api.spending`).
    budget: the one that was spent; TooLarge where the files take more bytes than it says.

    Raises UserError for bad input, for coverage below the recipe's minimum, and where verification fails.
    """
    (recipe, changed), progress = fitted(recipe or Recipe()), progress or Silent()
    changed = (*filter(None, [told]), *changed)
    if recipe.budget is not None:
        raise UserError("a budget is spent by `qcompile MODEL.onnx` and qcompile.compile alone")
    source = Path(model)
    check_model_file(source)
    target = default_output(source, recipe) if output is None else Path(output)
    started = time.monotonic()
    progress.step("loading")
    calibration = Calibration.of(calibration)
    read = [*named(calibration.files), *(() if statistics is None else (Path(statistics),))]
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
        budget,
    )
    if (shelf := None if checkpoints is None else Path(checkpoints)) is not None:
        finished.check(shelf)
    with Work(target, fresh=fresh, shelf=shelf) as work:
        return _compiled(job, work, progress, started, bench=bench)


@dataclass(frozen=True)
class _Job:
    """What `compile_model` was asked for. changed: what a target changed in the recipe. asked: folders, as named.
    budget: that was spent, "" where none was.
    """

    source: Path
    target: Path
    recipe: Recipe
    changed: Sequence[str]
    calibration: Calibration
    statistics: Path | None
    evaluation: Calibration | None
    verify: str
    asked: list[str]
    budget: str


def _compiled(asked: _Job, work: Work, progress: Progress, started: float, *, bench: bool) -> Report:
    """The work itself; what is finished of it is put aside in `work`."""
    source, target, recipe, statistics = asked.source, asked.target, asked.recipe, asked.statistics
    prepared = prepare_model(source, recipe, progress)
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
    )
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
        report.mixed = keep(graph, walked.passes, plan, data, source, wish(recipe), recipe.provider, progress, rankings)
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
    lower(graph, recipe.target)
    int8 = activation_bits.leveled(graph) - given
    halved = recipe.scale_bits == 16 or graph.meta.get(HALF_SCALES, False)
    graph.meta[HALF_SCALES] = halved and not TARGETS[recipe.target].runtime
    halve(graph)
    with publish.staging(target) as staged:
        with phase("save"):
            written = save_model(graph, staged, metadata=_metadata(report, recipe))
        if asked.budget:
            Amount.parse(asked.budget).check(written.model_bytes + written.data_bytes)
        ran = _run(staged, walked, verified, int8, level, progress)
        check_saved(staged, graph)
        report.verified = told(level, ran=ran)
        report.target = [*asked.changed, *check_conformance(staged, recipe.target)]
        if bench:
            progress.step("running both models in turns")
            report.speed = paired(source, staged, plan, (*data.evaluation, *data.checks)[0], recipe.provider)
        report.compiled_bytes = written.model_bytes + written.data_bytes
        report.output, report.asked, report.budget = str(target), asked.asked, asked.budget
        report.files = [file.name for file in (*written.paths, report_path(target), page_path(target))]
        report.seconds, report.peak_memory = aside.seconds + time.monotonic() - started, peak_memory()
        report.phases = phases()
        with publish.writing(target):
            report_path(staged).write_text(report.to_json(), encoding="utf-8")
            page_path(staged).write_text(to_html(report), encoding="utf-8")
        publish.publish(written.paths, target.absolute(), (report_path(staged), page_path(staged)))
    return report


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


def report_path(output: Path) -> Path:
    """Where the report of a compiled model lies."""
    return output.with_name(f"{output.stem}.report.json")


def page_path(output: Path) -> Path:
    """Where the report lies as a page for people."""
    return output.with_name(f"{output.stem}.report.html")


def _metadata(report: Report, recipe: Recipe) -> dict[str, str]:
    told = " ".join(f"{name} {number}" for name, number in report.versions.items())
    return {
        "qcompile.recipe": dump_recipe(recipe),
        "qcompile.source": report.source_hash,
        "qcompile.versions": told,
        "qcompile.data": visible(report.data),  # it names files
    }
