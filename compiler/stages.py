"""From a file to a model behind the walk, and on to the finished graph: what every command that compiles does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.apart import bundled, check_apart, digests
from qcompile.compiler.data.calibration import Calibration, Data, Sampling, gather, with_evaluation
from qcompile.compiler.data.calibration_files import named as named_files
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.data.oddities import oddities
from qcompile.compiler.data.readers import Batches, is_reference
from qcompile.compiler.data.size_names import drop_contradicted
from qcompile.compiler.facts.memory import check_sizes
from qcompile.compiler.facts.model import file_size, versions
from qcompile.compiler.facts.value_types import told_by_runtime
from qcompile.compiler.files.cache import files_digest
from qcompile.compiler.files.load import hash_and_check, load_model
from qcompile.compiler.files.work import Work
from qcompile.compiler.measure import randomness
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.mixed.keep import Wish
from qcompile.compiler.plan import HELD, Planned, effective, facts_of, packages, planned, reading
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.report.coverage import Recorded, account, in_order, quantizers, record
from qcompile.compiler.results.errors import ActivationRange, RowsSeen
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk import promises, saved_statistics
from qcompile.compiler.walk.checkpoints import Checkpoints
from qcompile.compiler.walk.needs import check_fits, fed, load_of
from qcompile.compiler.walk.patterns import check_patterns
from qcompile.compiler.walk.saved_statistics import SavedStatistics
from qcompile.compiler.walk.walk import Job, observed, told_of_caches
from qcompile.passes.activations import INT8
from qcompile.passes.base import Pass, Region, WalksAgain
from qcompile.passes.contract import Fact, Reads, Stage
from qcompile.passes.errors import UserError
from qcompile.passes.formats import named
from qcompile.passes.formats.attention import to_microsoft_attention
from qcompile.passes.formats.half_scales import HALF_SCALES, halve
from qcompile.passes.linears import find_linears, vocabulary_size
from qcompile.passes.masks import mark_infinite
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.policy import Policy
from qcompile.passes.targets import TARGETS

# Batches of calibration data beside the check batches, by which it is told what a model will meet.
_LOOKED_AT = 8


@dataclass(frozen=True)
class Prepared:
    """A model as the walk takes it, with the passes of its recipe, and which weight gets which grid.

    constants: the large floats of it, for coverage. order: the places of its nodes, by name.
    """

    source: Path
    recipe: Recipe
    model: ir.Model
    passes: Sequence[Pass]
    policy: Policy
    plan: InputPlan
    report: Report
    job: Job
    constants: Sequence[Recorded]
    order: Mapping[str, int]

    @property
    def observes(self) -> bool:
        """Whether some pass wants ranges of activations."""
        return bool(observed(self.passes, self.model))


@dataclass(frozen=True)
class Walked:
    """A model behind the walk: rewritten, its activations observed.

    watched: observers by activation. outputs: compiled and float ones of the check batches.
    """

    prepared: Prepared
    data: Data
    watched: Mapping[ir.Value, Observer]
    outputs: list[tuple[Arrays, Arrays]]

    @property
    def model(self) -> ir.Model:
        """The graph."""
        return self.prepared.model

    @property
    def passes(self) -> Sequence[Pass]:
        """Those of the recipe, `prepare` first."""
        return self.prepared.passes

    @property
    def plan(self) -> InputPlan:
        """What the graph's inputs are for, as it is now."""
        return self.prepared.plan.with_caches_of(self.model)

    @property
    def report(self) -> Report:
        """As far as it is known."""
        return self.prepared.report


def walk_model(
    source: Path, recipe: Recipe, calibration: Calibration, progress: Progress, *, checks: bool = True
) -> Walked:
    """Load and prepare the model, and take the calibration data through it; `checks`: the check batches, too."""
    prepared = prepare_model(source, recipe, progress)
    data = gather_data(prepared, calibration, verified=checks)
    return walk(prepared, data if checks else replace(data, checks=[], evaluation=[]))


@phase("load")
def prepare_model(source: Path, recipe: Recipe, progress: Progress, *, dry: bool = False) -> Prepared:
    """Load the model and canonicalize its graph. Raises UserError for a model or a recipe that cannot work.

    dry: its weights are not read: there is no hash of them, and NaN among them is not seen.
    """
    recipe = effective(recipe)
    planned(recipe, HELD)
    graph = load_model(source)
    to_microsoft_attention(graph)
    made = planned(recipe, facts_of(graph))
    passes = made.passes
    hashed = "" if dry else hash_and_check(source, graph)
    report = Report(str(source), hashed, recipe.to_dict(), versions() | packages(recipe))
    report.source_bytes = file_size(source, graph)
    progress.step("preparing")
    for whole in (p for p in passes if p.stage == Stage.BEFORE):
        promises.run(whole, Region.whole(graph, told_by_runtime))
    randomness.settle(graph)
    check_patterns(recipe.include, recipe.exclude, [pattern for pattern, _ in recipe.named], graph)
    check_sizes(graph)
    check_target(graph, recipe.target, made)
    plan = input_plan(graph)
    wish(recipe).bound.check_metric(decoder=plan.logits is not None)
    int8 = INT8.get(recipe.target) if recipe.activation_bits != 16 else None
    job = Job(graph, passes, report, progress, provider=recipe.provider, int8=int8)
    order = {str(node.name): place for place, node in enumerate(graph.graph.all_nodes())}
    return Prepared(source, recipe, graph, passes, made.policy, plan, report, job, record(graph), order)


def _options(given: Calibration) -> list[str]:
    """Calibration data as the command line is given it; none of what a program gives."""
    pictures = given.pictures
    reader = given.reader  # of a function that was read, its name is what was given
    files = [reader.label] if isinstance(reader, Batches) and is_reference(reader.label) else given.words
    words = ["--calibration", *files] if files else []
    for option, own in (
        ("--image-mean", pictures.mean),
        ("--image-std", pictures.std),
        ("--image-size", pictures.size),
    ):
        words += [option, ",".join(map(str, own))] if own else []
    return words + (["--tokenizer", str(given.tokenizer)] if given.tokenizer is not None else [])


def _bounded(recipe: Recipe) -> bool:
    """Whether what nodes are kept must hold on batches that they were not chosen by."""
    return any(own is not None for own in (recipe.keep_share, recipe.max_kl, recipe.min_sqnr))


def wish(recipe: Recipe) -> Wish:
    """What is to stay in float for its sensitivity."""
    return Wish(recipe.keep_worst, recipe.keep_share, recipe.max_kl, recipe.min_sqnr, recipe.keep_as)


def judged_by(evaluation: Calibration) -> dict[str, str]:
    """What the accuracy is told on, by its content (`apart.digests`)."""
    own = digests(named_files(evaluation.files), evaluation.texts)
    return {**own, **bundled()} if evaluation.general else own


def load_statistics(prepared: Prepared, path: Path) -> SavedStatistics:
    """The ranges of a file, after the checks that need no data."""
    saved = saved_statistics.load(path)
    if not prepared.observes:
        told = f"add {reading(Reads.RANGES)}"
        raise UserError(f"--statistics are ranges of activations, and no pass of this list takes them: {told}")
    saved.check(prepared.report.source_hash, prepared.recipe.passes)
    return saved


@phase("data")
def gather_data(
    prepared: Prepared,
    calibration: Calibration,
    saved: SavedStatistics | None = None,
    evaluation: Calibration | None = None,
    *,
    verified: bool = True,
    few: bool = False,
    measured: bool = True,
    room: int | None = None,
    aside: bool = False,
    bound: bool = False,
) -> Data:
    """The calibration data that the passes need; ranges may come from `saved`. UserError where it is not enough.

    evaluation: data that the accuracy is told on; UserError where something of it is calibrated on, too. Without it,
    rows of the calibration data are held aside for that, where there are enough.
    verified: whether check batches are run. few: of random tokens they are short.
    measured: whether somebody asked for what only they tell.
    room: bytes free on the output's disk.
    aside: some of it is held aside for choices by measured errors; bound: more, that such a choice is judged by. As for
    recipes that keep nodes in float.
    """
    files = digests(named_files(calibration.paths), calibration.texts)
    judged = judged_by(evaluation) if evaluation is not None else {}
    known = saved.header.calibrated if saved is not None else {}
    check_apart({**files, **known}, judged)
    observes, recipe = prepared.observes and saved is None, prepared.recipe
    needed = observes or any(p.reads - {Reads.RANGES} for p in prepared.passes)
    data = gather(
        prepared.plan,
        prepared.source,
        Sampling(
            recipe.samples,
            recipe.context,
            aside=aside or bool(recipe.mixed),
            seed=recipe.seed,
            provider=recipe.provider,
            bound=bound or _bounded(recipe),
            accuracy=evaluation is None,
            few=few,
        ),
        calibration,
        needed=aside or bool(recipe.mixed) or needed,
        learnt=saved is not None,
    )
    looked = (*data.checks, *data.calibration[:_LOOKED_AT])
    if told := drop_contradicted(prepared.model, looked):
        data = replace(data, description=f"{data.description}; {told}")
    if data.bundled and calibration.bundled is None:
        files = {**files, **bundled()}
        check_apart(files, judged)
    if evaluation is not None:
        data = with_evaluation(prepared.plan, prepared.source, data, evaluation)
    elif saved is not None and not saved.leaves(files, drawn(recipe)):
        data = replace(data, evaluation=(), none_aside="the statistics may have seen all of it")
    prepared.report.warnings = list(oddities(prepared.plan, data.calibration, ranges=observes))
    prepared.report.given = _options(calibration)
    own = data.calibration or (saved is not None and not known)  # files of older versions do not say
    prepared.report.calibrated = {**(files if own else {}), **known}
    _check_fit(prepared, data)
    data = data if verified else replace(data, verified=False, evaluation=[])
    load = load_of(*([fed(prepared.plan, own) for own in some] for some in (data.calibration, data.checked)))
    cuts = prepared.plan.ids is not None and prepared.plan.sequence is None
    check_fits(prepared.model, prepared.passes, prepared.policy, load, room=room, judged=measured, cuts=cuts)
    mark_infinite(prepared.model, _infinite(prepared.plan, (*data.calibration, *data.checks)))
    if data.guess:
        refused = [p.name for p in prepared.passes if p.reads & {Reads.OUTPUTS, Reads.STATISTICS}]
        refused += [p.name for p in prepared.passes if observes and Reads.RANGES in p.reads]
        if refused:
            raise UserError(
                f"--calibration norms runs nothing, and {refused[0]} needs activations: leave it out or give "
                "--calibration self"
            )
    return data


def drawn(recipe: Recipe) -> str:
    """What decides, beside the data itself, which of it is calibrated on, and what is held aside."""
    return f"{recipe.samples} windows of {recipe.context}"


def _infinite(plan: InputPlan, batches: Sequence[Batch]) -> set[str]:
    """Names of the inputs that are infinite somewhere in the batches; data is only read for those that may be."""
    names = [given.name for given in plan.inputs if given.is_float and given.unbounded]
    return {name for batch in batches if names for name in names if np.isinf(batch.feeds.get(name, 0)).any()}


@phase("checkpoints")
def checkpoints_of(work: Work, prepared: Prepared, data: Data, statistics: Path | None, level: str) -> Checkpoints:
    """Those of a compile that keeps them in `work`; statistics: the file that ranges come from. level: `--verify`."""
    more = [level] if statistics is None else [level, files_digest([statistics])]
    return Checkpoints(work, prepared.model, prepared.passes, prepared.report, data, more)


def walk(
    prepared: Prepared, data: Data, saved: SavedStatistics | None = None, keep: Checkpoints | None = None
) -> Walked:
    """Take the data through the graph, segment by segment. Observers are filled from `saved` where there is one.

    keep: where finished segments are put aside, and those of an interrupted compile are.
    """
    report, graph = prepared.report, prepared.model
    report.data = data.description
    begun = keep is not None and keep.found is not None
    wanted = {} if saved is not None or begun else observed(prepared.passes, graph)
    outputs = prepared.job.walk(prepared.plan, data, wanted, keep)
    watched = observed(prepared.passes, graph)
    for observer in watched.values() if saved is None else ():
        rows = observer.row_extremes.rows if isinstance(observer, Extremes) else 0
        if rows:
            report.rows = RowsSeen((rows, rows), (0, 0)).joined(report.rows)
    if saved is not None:
        saved.check_graph(graph)
        saved.restore(watched)
        report.data += f"; ranges from {saved.path.name}: {saved.header.data}"
    return Walked(prepared, data, watched, outputs)


@phase("finish")
def finish(walked: Walked, progress: Progress) -> list[Arrays]:
    """Run the passes behind the walk; the outputs of the finished graph on the check batches."""
    job, report = walked.prepared.job, walked.report
    again = any(isinstance(p, WalksAgain) for p in walked.passes)
    original = walked.model.clone() if again else walked.model
    for late in (p for p in walked.passes if p.stage == Stage.BEHIND):
        progress.step(late.name)
        if reason := _unfit(late, walked.model, walked.data):
            late.decide("", "kept", reason)
            continue
        if isinstance(late, WalksAgain):
            job.walk_again(late, walked.plan, walked.data, original)
        coded = Fact.CACHES in late.ensures and job.integer and bool(walked.data.checked)
        before = job.run(walked.plan, walked.data) if coded else []
        promises.run(late, Region.whole(walked.model))
        if coded:
            after = job.run(walked.plan, walked.data)
            report.caches = told_of_caches(walked.plan, walked.data, after, before)
        report.ranges += activation_ranges(late, walked.watched)
    report.decisions = {p.name: p.decisions for p in walked.passes}
    _account(walked)
    return job.verify(walked.plan, walked.data, walked.outputs)


def halve_scales(model: ir.Model, recipe: Recipe) -> None:
    """Store scales as float16 in place, where the recipe or the source has them so, and the target takes them."""
    halved = recipe.scale_bits == 16 or model.meta.get(HALF_SCALES, False)
    model.meta[HALF_SCALES] = halved and not TARGETS[recipe.target].runtime
    halve(model)


def _check_fit(prepared: Prepared, data: Data) -> None:
    """Raise UserError, before any work, where the data does not fit a pass that is listed, or wanted by one that is."""
    names = {step.name for step in prepared.recipe.passes}
    needed = frozenset[Fact]().union(*(p.needs | p.prefers for p in prepared.passes if p.name in names))
    for own in prepared.passes:
        asked = own.name in names or bool(own.ensures & needed)
        if asked and (reason := _unfit(own, prepared.model, data)):
            raise UserError(f"pass {own.name}: {reason}: leave it out, or give other data")


def _unfit(own: Pass, model: ir.Model, data: Data) -> str:
    """Why a pass must not run: the data is what the model will meet, and would not fit the graph that it makes."""
    if type(own).unfit is Pass.unfit:
        return ""
    reasons = (own.unfit(model, batch.feeds) for batch in (*data.checks, *data.calibration[:_LOOKED_AT]))
    return next(filter(None, reasons), "")


def _account(walked: Walked) -> None:
    """Have the quantizer's decisions name every large constant that is left in float."""
    report, own = walked.report, quantizers(walked.passes)
    report.quantizers = tuple(p.name for p in own) or ("float",)
    # That of the pass knows more: what was kept in float for its sensitivity, say.
    policy = getattr(own[0], "policy", walked.prepared.policy) if own else walked.prepared.policy
    for other in report.quantizers[1:]:
        report.decisions[other] = []
    made = account(walked.prepared.constants, walked.model, walked.passes, policy)
    report.decisions[report.quantizers[0]] = in_order(made, walked.prepared.order)


def check_target(model: ir.Model, target: str, made: Planned) -> None:
    """Raise UserError where the target has no operator for a weight as it is to be stored, before any work is done."""
    if not made.ensures(Fact.PACKED):
        return
    vocabulary = vocabulary_size(model)
    for linear in find_linears(model.graph):
        spec = replace(made.policy, blank=True).for_linear(linear, vocabulary)
        if not isinstance(spec, str) and (told := named(spec.format).refusal(target, spec, linear.shape[0])):
            raise UserError(told)


def activation_ranges(late: Pass, watched: Mapping[ir.Value, Observer]) -> list[ActivationRange]:
    """The range that a pass chose for each activation it was shown, beside what was seen of it."""
    found = []
    for value, (low, high) in late.chosen_ranges.items():
        observer = watched[value]
        seen = observer if isinstance(observer, Extremes) else None
        ends = (seen.low, seen.high) if seen is not None and seen.low is not None else (low, high)
        edges, counts = observer.plot() if isinstance(observer, Histogram) else ((), ())
        told = (float(np.min(ends[0])), float(np.max(ends[1])), observer.name, counts, edges)  # type: ignore[arg-type]
        found.append(ActivationRange(observer.value, low, high, *told))
    return found
