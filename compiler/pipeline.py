"""The whole job: load, prepare, calibrate and rewrite segment by segment, verify, save."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from qcompile.compiler import activations, output_files, statistics_file
from qcompile.compiler.extract import Piece
from qcompile.compiler.html_report import to_html
from qcompile.compiler.inputs import InputPlan, input_plan
from qcompile.compiler.mixed import check_metric, keep
from qcompile.compiler.plan import INT8, build, effective, make_policy
from qcompile.compiler.ranking import RankingCache
from qcompile.compiler.recipe import Recipe, dump_recipe
from qcompile.compiler.report import ActivationRange, Report
from qcompile.compiler.segments import Segment, split
from qcompile.compiler.sources import Data, gather
from qcompile.compiler.store import check_finite, check_output_path, load_model, model_hash, save_model
from qcompile.compiler.stream import Arrays, Runner, Stream
from qcompile.compiler.verify import (
    check_reloaded,
    compare_outputs,
    node_errors,
    probe_nodes,
    probe_twins,
    run_file,
    twin_errors,
)
from qcompile.passes.base import Pass, Region
from qcompile.passes.errors import UserError
from qcompile.passes.formats.lower import check_block_size, lower
from qcompile.passes.linears import find_linears, vocabulary_size
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.pack import Pack
from qcompile.passes.qdq.twin import TWIN
from qcompile.runtime.sessions import ort_version


class Progress(Protocol):
    """Told what is going on; the command line draws a bar, the default says nothing."""

    def step(self, name: str) -> None:
        """A new step of the job begins."""

    def total(self, rows: int) -> None:
        """Tokens that the segments will see in all."""

    def advance(self, rows: int) -> None:
        """So many tokens went through a segment."""


class Silent:
    """No progress shown."""

    def step(self, name: str) -> None:
        """Nothing."""

    def total(self, rows: int) -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Calibration:
    """What the user gives: files (text, .jsonl, .npz) or module:function, and a tokenizer's folder."""

    files: Sequence[str] = ()
    tokenizer: Path | None = None


def compile_model(
    model: Path | str,
    recipe: Recipe | None = None,
    *,
    output: Path | str | None = None,
    calibration: Calibration | Sequence[str] = (),
    progress: Progress | None = None,
    statistics: Path | str | None = None,
) -> Report:
    """Compile the model file to `output` (with its data file and report.json beside it); everything or nothing.

    output: MODEL-int4.onnx beside the model where it is not given. calibration: files, or files and a tokenizer.
    statistics: a file of `calibrate_model` that ranges are taken from, instead of a run over calibration data.

    Raises UserError for bad input, for coverage below the recipe's minimum, and where verification fails.
    """
    recipe, progress = effective(recipe or Recipe()), progress or Silent()
    source = Path(model)
    target = default_output(source, recipe) if output is None else Path(output)
    started = time.monotonic()
    progress.step("loading")
    check_output_path(source, target)
    walked = walk_model(source, recipe, calibration, progress, statistics)
    graph, passes, plan, data = walked.model, walked.passes, walked.plan, walked.data
    report, job = walked.report, walked.job
    if recipe.mixed:
        given = (walked.calibration.files, walked.calibration.tokenizer, statistics)
        rankings = RankingCache(source, report.source_hash, recipe, report.versions, *given)
        report.mixed = keep(graph, passes, plan, data, source, recipe, progress, rankings)
    if recipe.target == "qcompile":
        report.nodes = activations.choose(report.nodes, recipe.activations)
        activations.write(graph, report.nodes)
    for late in (p for p in passes if p.after_walk):
        progress.step(late.name)
        if late.walks_again:
            job.walk_again(late, plan, data)
        late.call(Region.whole(graph))
        report.ranges += activation_ranges(late, walked.watched)
    report.decisions = {p.name: p.decisions for p in passes}
    verified = job.verify(plan, data, walked.outputs)
    _check_coverage(report, recipe)
    progress.step("saving")
    lower(graph, recipe.target)
    with output_files.staging(target) as staged:
        saved = save_model(graph, staged, metadata=_metadata(report, recipe))
        progress.step("running the saved file")
        reloaded = run_file(staged, plan, data.checks, recipe.provider)
        report.reload_error = check_reloaded(reloaded, verified, element_type(graph), rounding=report.rounding)
        report.compiled_bytes = saved.model_bytes + saved.data_bytes
        report.files = [file.name for file in (*saved.paths, report_path(target), page_path(target))]
        report.seconds, report.peak_memory = time.monotonic() - started, peak_memory()
        with output_files.writing(target):
            report_path(staged).write_text(report.to_json(), encoding="utf-8")
            page_path(staged).write_text(to_html(report), encoding="utf-8")
        output_files.publish(saved.paths, target.absolute())
        report_path(staged).replace(report_path(target))
        page_path(staged).replace(page_path(target))
    return report


@dataclass(frozen=True)
class Walked:
    """A model behind the walk: rewritten, its activations observed.

    watched: observers by activation. outputs: compiled and float ones of the check batches.
    """

    model: ir.Model
    passes: Sequence[Pass]
    plan: InputPlan
    data: Data
    watched: Mapping[ir.Value, Observer]
    outputs: list[tuple[Arrays, Arrays]]
    report: Report
    job: "_Job"
    calibration: Calibration


def walk_model(
    source: Path,
    recipe: Recipe,
    calibration: Calibration | Sequence[str],
    progress: Progress,
    statistics: Path | str | None = None,
    *,
    checks: bool = True,
) -> Walked:
    """Load and prepare the model, and take the calibration data through it; `checks`: the check batches, too.

    Observers are filled from the file `statistics` where there is one; other passes' data is still needed then.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    graph = load_model(source)
    check_finite(graph)
    passes = build(recipe, scale_dtype(graph))
    report = Report(str(source), model_hash(source), recipe.to_dict(), versions())
    report.source_bytes = file_size(source, graph)
    saved = None if statistics is None else statistics_file.load(Path(statistics))
    progress.step("preparing")
    for whole in (p for p in passes if p.whole_model):
        whole.call(Region.whole(graph))
    check_target(graph, recipe)
    job = _Job(graph, recipe, passes, report, progress)
    plan = input_plan(graph)
    check_metric(recipe, plan)
    watched = observed(passes, graph)
    if saved is not None:
        if not watched:
            raise UserError("--statistics are ranges of activations, and no pass of this list takes them: add qdq")
        saved.check(report.source_hash, recipe.passes)
    needed = recipe.mixed or (bool(watched) and saved is None)
    needed |= any(p.needs_statistics or p.walks_again for p in passes)
    data = gather(plan, source, recipe, calibration.files, calibration.tokenizer, needed=needed)
    data = data if checks else replace(data, checks=[])
    report.data = data.description
    outputs = job.walk(plan, data, watched if saved is None else {})
    watched = observed(passes, graph)
    if saved is not None:
        saved.check_graph(graph)
        saved.restore(watched)
        report.data += f"; ranges from {saved.path.name}: {saved.header.data}"
    return Walked(graph, passes, plan, data, watched, outputs, report, job, calibration)


def observed(passes: Sequence[Pass], model: ir.Model) -> dict[ir.Value, Observer]:
    """The observers of all passes for the activations of the graph as it is."""
    return {value: own for p in passes for value, own in p.observed(model).items()}


def check_target(model: ir.Model, recipe: Recipe) -> None:
    """Raise UserError where the target does not take the group size of a weight, before any work is done."""
    if recipe.target != "matmulnbits" or not any(step.name == "pack" for step in recipe.passes):
        return
    policy, vocabulary = make_policy(recipe, np.float32), vocabulary_size(model)
    for linear in find_linears(model.graph):
        spec = policy.for_linear(linear, vocabulary)
        if not isinstance(spec, str):
            check_block_size(spec.group_size(linear.shape[0]))


def peak_memory() -> int:
    """Bytes of the largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def default_output(model: Path, recipe: Recipe) -> Path:
    """Where a compiled model goes that is given no name."""
    bits = 8 if any(step.name in INT8 for step in recipe.passes) else recipe.bits
    return model.with_name(f"{model.stem}-int{bits}.onnx")


def report_path(output: Path) -> Path:
    """Where the report of a compiled model lies."""
    return output.with_name(f"{output.stem}.report.json")


def page_path(output: Path) -> Path:
    """Where the report lies as a page for people."""
    return output.with_name(f"{output.stem}.report.html")


def versions() -> dict[str, str]:
    """Versions of everything that decides the result."""
    found = {"onnxruntime": ort_version()}
    for name in ("qcompile-onnx", "onnx", "onnx-ir", "onnxscript", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


class _Job:
    """One compile on its way through the segments."""

    def __init__(self, model: ir.Model, recipe: Recipe, passes: Sequence[Pass], report: Report, progress: Progress):
        self.model, self.recipe, self.report, self.progress = model, recipe, report, progress
        self.passes = [p for p in passes if not p.whole_model and not p.after_walk]
        self.late = [p for p in passes if p.after_walk]
        self.pack = next((p for p in passes if isinstance(p, Pack)), None)

    def walk(self, plan: InputPlan, data: Data, watched: Mapping[ir.Value, Observer]) -> list[tuple[Arrays, Arrays]]:
        """Take both streams through all segments, rewriting each; `watched` sees what the rewritten graph gives.

        Returns the outputs on the check batches, compiled and float.
        """
        targets = {linear.node for linear in find_linears(self.model.graph)}
        segments = split(self.model, targets.__contains__)
        runner = Runner(self.model, plan, self.recipe.provider, self.progress.advance)
        calibration, checks = Stream(data.calibration), Stream(data.checks)
        rows = 2 * sum(batch.rows for batch in (*data.calibration, *data.checks))
        self.progress.total(rows * len(segments))
        outputs: list[tuple[Arrays, Arrays]] = [({}, {}) for _ in data.checks]
        static = bool(observed(self.late, self.model))
        inside = {node for segment in segments for node in segment.nodes}
        loose = [node for node in self.model.graph if node not in inside]
        for number, segment in enumerate(segments, 1):
            self.progress.step(f"segment {number} of {len(segments)}")
            self._rewrite(runner, segment, calibration, checks, outputs, int8=data.real)
            if watched:
                watched = observed(self.late, self.model)  # smoothing may have put a Mul before a linear
            own = _seen_in(segment, segments, watched)
            region = Region(self.model, [*(loose if number == 1 else ()), *segment.nodes])
            more = [pair for p in (*self.passes, *self.late) if static for pair in p.observed_in(region).items()]
            if calibration.batches and (own or more):
                runner.observe(segment, own, calibration, more=more)
            if calibration.batches:
                runner.advance(segment, calibration)
        if self.pack is not None:
            self.pack.skip_rest(self.model)
        return outputs

    def verify(self, plan: InputPlan, data: Data, outputs: list[tuple[Arrays, Arrays]]) -> list[Arrays]:
        """The outputs of the graph as it is on the check batches, compared with the float ones.

        Where a pass behind the walk made nodes integer, the check batches go through the graph once more, and each such
        node is compared with its float twin.
        """
        compiled = [compiled for compiled, _ in outputs]
        targets = {node for node in self.model.graph if TWIN in node.meta}
        if targets:
            self.progress.step("checking integer nodes")
            compiled = self._run_checks(plan, data, split(self.model, targets.__contains__))
        compared = compare_outputs(compiled, [original for _, original in outputs])
        self.report.outputs = sorted(compared, key=lambda output: output.name != plan.logits)
        self.report.rounding = max((o.relative for o in compared), default=0.0) if targets else 0.0
        return compiled

    def walk_again(self, late: Pass, plan: InputPlan, data: Data) -> None:
        """Take the calibration stream through the graph as it is now, segment by segment, for one pass."""
        targets = {node for node in self.model.graph if TWIN in node.meta}
        runner, stream = Runner(self.model, plan, self.recipe.provider), Stream(data.calibration)
        for segment in split(self.model, targets.__contains__) if stream.batches else ():
            for observers in late.walk_again(Region(self.model, list(segment.nodes))):
                runner.observe(segment, observers, stream)
            runner.advance(segment, stream)

    def _run_checks(self, plan: InputPlan, data: Data, segments: Sequence[Segment]) -> list[Arrays]:
        runner, stream = Runner(self.model, plan, self.recipe.provider), Stream(data.checks)
        own = {str(value.name) for value in self.model.graph.outputs}
        results: list[Arrays] = [{} for _ in data.checks]
        for segment in segments:

            def probe(piece: Piece, nodes: Sequence[ir.Node] = segment.nodes) -> list[str]:
                return probe_twins(piece, nodes)

            after = runner.outputs(segment, stream, original=False, prepare=probe)
            self.report.nodes += twin_errors(segment.nodes, after)
            if segment.carry is not None:
                stream.quantized = [a[str(segment.carry.name)] for a in after]
            for kept, a in zip(results, after, strict=True):
                kept.update((name, array) for name, array in a.items() if name in own)
        return results

    def _rewrite(
        self,
        runner: Runner,
        segment: Segment,
        calibration: Stream,
        checks: Stream,
        outputs: list[tuple[Arrays, Arrays]],
        *,
        int8: bool,
    ) -> None:
        region = Region(self.model, list(segment.nodes))
        if calibration.batches and any(rewrite.needs_statistics for rewrite in self.passes):
            activations = list(dict.fromkeys(linear.activation for linear in find_linears(segment.nodes)))
            region.statistics = runner.collect(segment, activations, calibration)
        before = runner.outputs(segment, checks, original=True)
        # The passes work on columns side by side in threads of their own; BLAS threads inside those only fight.
        with threadpool_limits(limits=1, user_api="blas"):
            for rewrite in self.passes:
                rewrite.call(region)
        int8 = int8 and self.recipe.target == "qcompile" and self.recipe.activations != 16

        def probe(piece: Piece) -> list[str]:
            return probe_nodes(piece, segment.nodes, int8=int8)

        after = runner.outputs(segment, checks, original=False, prepare=probe)
        self.report.nodes += node_errors(segment.nodes, after)
        if segment.carry is not None:
            name = str(segment.carry.name)
            checks.original, checks.quantized = [b[name] for b in before], [a[name] for a in after]
        own = {str(value.name) for value in self.model.graph.outputs}
        for kept, a, b in zip(outputs, after, before, strict=True):
            kept[0].update((name, array) for name, array in a.items() if name in own)
            kept[1].update((name, array) for name, array in b.items() if name in own)


def _seen_in(
    segment: Segment, segments: Sequence[Segment], watched: Mapping[ir.Value, Observer]
) -> dict[ir.Value, Observer]:
    """The observed values that a segment shows: those it computes, and of those that no segment does its inputs."""
    if not watched:
        return {}
    nodes, everywhere = set(segment.nodes), {node for other in segments for node in other.nodes}
    found = {}
    for value, observer in watched.items():
        producer = value.producer()
        readers = [use.node for use in value.uses()]
        first = next((other for other in segments if any(node in other.nodes for node in readers)), segments[0])
        if producer in nodes or (producer not in everywhere and first is segment):
            found[value] = observer
    return found


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


def _check_coverage(report: Report, recipe: Recipe) -> None:
    if report.quantizer and report.coverage < recipe.min_coverage:
        reasons = sorted({d.reason for kind in report.products for d in report.skipped(kind)})
        raise UserError(
            f"only {report.coverage:.1%} of the {report.kinds} weights were quantized, below --min-coverage "
            f"{recipe.min_coverage}; left in float: {'; '.join(reasons[:4])}; nothing was written"
        )


def element_type(model: ir.Model) -> ir.DataType:
    """The float type of most weights."""
    sizes: dict[ir.DataType, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=ir.DataType.FLOAT)


def scale_dtype(model: ir.Model) -> type[np.float16] | type[np.float32]:
    """The numpy type of the scales that the compiled model will hold."""
    return np.float16 if element_type(model) == ir.DataType.FLOAT16 else np.float32


def file_size(path: Path, model: ir.Model) -> int:
    """Bytes of a model file and of the external data it uses."""
    tensors = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    return path.stat().st_size + sum({(t.location, t.offset): t.nbytes for t in tensors}.values())


def _metadata(report: Report, recipe: Recipe) -> dict[str, str]:
    told = " ".join(f"{name} {number}" for name, number in report.versions.items())
    return {
        "qcompile.recipe": dump_recipe(recipe),
        "qcompile.source": report.source_hash,
        "qcompile.versions": told,
        "qcompile.data": report.data,
    }
