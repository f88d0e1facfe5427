"""One model on its way through the segments: rewritten, observed, checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.memory import give_back
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.measure.predictions import predictions
from qcompile.compiler.results.errors import RowsSeen
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk import promises
from qcompile.compiler.walk.checkpoints import Checkpoints
from qcompile.compiler.walk.extract import Piece
from qcompile.compiler.walk.pace import Pace
from qcompile.compiler.walk.runner import Beside, Runner, Stream, went_on
from qcompile.compiler.walk.segments import Segment, split, targets
from qcompile.compiler.walk.trial import through, tried
from qcompile.compiler.walk.verify import (
    compare_outputs,
    probabilities,
    probe_twins,
    twin_errors,
)
from qcompile.compiler.walk.verify_decoded import check_decoded
from qcompile.compiler.walk.verify_products import Products
from qcompile.passes.activations import Int8
from qcompile.passes.base import Pass, Region, WalksAgain
from qcompile.passes.contract import Fact, Reads, Stage
from qcompile.passes.formats.functions import is_product
from qcompile.passes.linears import Linear, find_linears, vocabulary_size
from qcompile.passes.observers.base import Observer
from qcompile.passes.proxies import proxies
from qcompile.passes.state import node_state, set_node
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import ONE_BLAS_THREAD


def observed(passes: Sequence[Pass], model: ir.Model) -> dict[ir.Value, Observer]:
    """The observers of all passes for the activations of the graph as it is."""
    return {value: own for p in passes for value, own in p.observed(model).items()}


@dataclass
class Walk:
    """How far a walk has come: with the graph, the passes and the report all that the next segments depend on.

    shown: by segment, what its observers see. loose: nodes of the prepared graph in no segment. floats: by output, what
    the float model gives on each batch of the evaluation. outputs: of the check batches, compiled and float.
    watched, ranged: whether anything is observed for the walk's caller, and whether passes behind the walk want ranges.
    done: segments that are finished.
    """

    segments: list[Segment]
    shown: list[dict[ir.Value, Observer]]
    loose: list[ir.Node]
    floats: dict[str, Spill]
    calibration: Stream
    checks: Stream
    evaluated: Beside | None
    outputs: list[tuple[Arrays, Arrays]]
    vocabulary: int | None
    watched: bool
    ranged: bool
    done: int = 0

    def feed(self, data: Data) -> None:
        """Give the streams their batches, which are not put aside."""
        self.calibration.batches, self.checks.batches = data.calibration, data.checked
        if self.evaluated is not None:
            self.evaluated.stream.batches = data.evaluation


class Job:
    """One compile on its way through the segments.

    provider: what runs them. int8: how products may round activations, so that probes measure what that adds; None
    where none does, or where that is settled. share: of packed products one of so many blocks of columns
    is compared.
    """

    def __init__(
        self,
        model: ir.Model,
        passes: Sequence[Pass],
        report: Report,
        progress: Progress,
        *,
        provider: str,
        int8: Int8 | None,
    ) -> None:
        self.model, self.report, self.progress = model, report, progress
        self.provider, self.int8 = provider, int8
        self.passes = [p for p in passes if p.stage == Stage.WALK]
        self.late = [p for p in passes if p.stage == Stage.BEHIND]
        self.guess, self.share = False, 1
        self.floats: dict[str, Spill] = {}  # by output, what the float model gives on each batch of the evaluation
        # Behind the walk, so that the outputs that it gave are not those of the finished graph.
        self.changed = any(Fact.FLOAT in p.takes or Fact.CACHES in p.ensures for p in self.late)
        self.sigmoids = probabilities(model)
        self.vocabulary: int | None = None

    @phase("walk")
    def walk(
        self, plan: InputPlan, data: Data, watched: Mapping[ir.Value, Observer], keep: Checkpoints | None = None
    ) -> list[tuple[Arrays, Arrays]]:
        """Take both streams through all segments, rewriting each; `watched` sees what the rewritten graph gives.

        Returns the outputs on the check batches, compiled and float. keep: where finished segments are put aside; the
        first ones are left out where it has them.
        """
        progress, self.guess = self.progress, data.guess
        found = keep.found if keep is not None else None
        walk = self._begun(plan, data, watched) if found is None else found
        walk.feed(data)
        self.vocabulary, self.floats = walk.vocabulary, walk.floats
        runner = Runner(self.model, plan, self.provider, progress.advance)
        rows = 2 * sum(batch.rows for batch in (*data.calibration, *data.checked))
        rows += sum(batch.rows for batch in data.evaluation)
        progress.total(rows * (len(walk.segments) - walk.done))
        asked = [p for p in (*self.passes, *self.late) if walk.ranged and (walk.watched or Reads.RANGES not in p.reads)]
        pace = Pace(len(walk.segments), walk.done)
        while walk.done < len(walk.segments):
            progress.step(pace.told(walk.done))
            self._step(runner, walk, data, asked)
            walk.done += 1
            if keep is not None:
                keep.after(walk, walk.done, len(walk.segments), walk.segments[walk.done - 1].nodes)
        for rewrite in self.passes:
            before = len(rewrite.decisions)
            with ONE_BLAS_THREAD:
                rewrite.call_rest(self.model)
            self.changed |= any(decision.action == "quantized" for decision in rewrite.decisions[before:])
        return walk.outputs

    def _begun(self, plan: InputPlan, data: Data, watched: Mapping[ir.Value, Observer]) -> Walk:
        """Before the first segment."""
        segments = split(self.model, targets(self.model).__contains__)
        floats = {name: Spill() for name in told(self.model, plan)} if data.evaluation else {}
        inside = {node for segment in segments for node in segment.nodes}
        return Walk(
            segments,
            seen_in(segments, watched),
            [node for node in self.model.graph if node not in inside],
            floats,
            Stream(data.calibration),
            Stream(data.checked),
            Beside(Stream(data.evaluation), floats) if data.evaluation else None,
            [({}, {}) for _ in data.checked],
            vocabulary_size(self.model),
            watched=bool(watched),
            ranged=bool(observed(self.late, self.model)),
        )

    def _step(self, runner: Runner, walk: Walk, data: Data, asked: Sequence[Pass]) -> None:
        """Rewrite one segment, observe what it gives, and take the calibration data through it."""
        segment, calibration, first = walk.segments[walk.done], walk.calibration, walk.done == 0
        loose, given = walk.loose if first else (), (calibration, walk.checks, walk.outputs)
        self._rewrite(runner, segment, *given, int8=data.real, beside=walk.evaluated, loose=loose)
        if not calibration.batches:
            return
        region = Region(self.model, [*loose, *segment.nodes], vocabulary=self.vocabulary)
        more = [pair for p in asked for pair in p.observed_in(region).items()]
        own = walk.shown[walk.done]
        if own or more:
            runner.observe(segment, own, calibration, more=more)
        runner.advance(segment, calibration)

    @phase("checks")
    def verify(self, plan: InputPlan, data: Data, outputs: list[tuple[Arrays, Arrays]]) -> list[Arrays]:
        """The outputs of the graph as it is on the check batches, compared with the float ones.

        Where something was made integer or coded behind the walk, the check batches go through the graph once more.
        Each integer node is compared with its float twin, each decoded weight with its codes.
        """
        if not data.checked:
            for node in self.model.graph:
                set_node(node, twin=None, decoded=None)
            return []
        walked = compiled = [compiled for compiled, _ in outputs]
        if self.changed:
            self.progress.step("checking integer nodes")
            self.report.nodes += check_decoded(self.model, self.provider)
            compiled = self._run_checks(plan, data)
            if not self.integer:
                self.report.caches = told_of_caches(plan, data, compiled, walked)
        self.tell(plan, data, compiled, [original for _, original in outputs])
        self.report.rounding = max((o.relative for o in self.report.outputs), default=0.0)
        return compiled

    @property
    def integer(self) -> bool:
        """Whether passes behind the walk change more than caches."""
        return any(Fact.FLOAT in p.takes for p in self.late)

    def run(self, plan: InputPlan, data: Data) -> list[Arrays]:
        """The outputs of the graph as it is on the check batches, caches in floats."""
        return self._run_checks(plan, data, probes=False)

    def tell(self, plan: InputPlan, data: Data, compiled: Sequence[Arrays], original: Sequence[Arrays]) -> None:
        """Report the errors of outputs against the float ones, and a decoder's predictions."""
        compared = compare_outputs(compiled, original)
        self.report.outputs = sorted(compared, key=lambda output: output.name != plan.logits)
        if data.real:
            self.report.predictions = predictions(plan, data.checks, compiled, original)

    @property
    def optimize(self) -> bool:
        """Whether ONNX Runtime's CPU provider may rewrite the finished graph in checks."""
        return all(p.fused for p in self.late)

    @phase("trial")
    def walk_again(self, late: WalksAgain, plan: InputPlan, data: Data, original: ir.Model) -> None:
        """Take the calibration data through the graph as it is now for one pass, where a trial confirms what it does.

        original: the graph as the walk left it.
        """
        runner, batches = self._finished_runner(plan), data.calibration
        if not batches:
            return
        verdict, decisions = tried(late, runner, original, batches)
        self.report.trials.append(f"{late.name}: {verdict.reason}")
        if verdict.kept:
            through(late, runner, batches)
        else:
            late.refuse(verdict.reason, decisions)

    def _finished_runner(self, plan: InputPlan) -> Runner:
        return Runner(self.model, plan, self.provider, optimize=self.optimize)

    def _run_checks(self, plan: InputPlan, data: Data, *, probes: bool = True) -> list[Arrays]:
        changed = {node for node in self.model.graph if node_state(node).twin is not None or is_product(node)}
        segments = split(self.model, changed.__contains__)
        runner, stream = self._finished_runner(plan), Stream(data.checked)
        own = {str(value.name) for value in self.model.graph.outputs}
        results: list[Arrays] = [{} for _ in data.checked]
        for segment in segments:

            def probe(piece: Piece, nodes: Sequence[ir.Node] = segment.nodes) -> list[str]:
                return probe_twins(piece, nodes) if probes else []

            after = runner.outputs(segment, stream, original=False, prepare=probe)
            if probes:
                self.report.nodes += twin_errors(segment.nodes, after)
            stream.quantized = went_on(segment, stream.quantized, after)
            for kept, a in zip(results, after, strict=True):
                kept.update((name, array) for name, array in a.items() if name in own)
        return [plan.decoded(found) for found in results]

    def _rewrite(
        self,
        runner: Runner,
        segment: Segment,
        calibration: Stream,
        checks: Stream,
        outputs: list[tuple[Arrays, Arrays]],
        *,
        int8: bool,
        beside: Beside | None,
        loose: Sequence[ir.Node],
    ) -> None:
        region = Region(self.model, list(segment.nodes), vocabulary=self.vocabulary, loose=loose)
        if any(rewrite.reads & {Reads.SCALES, Reads.STATISTICS} for rewrite in self.passes):
            linears = find_linears(segment.nodes)
            if self.guess:
                region.statistics = proxies({linear.activation: linear.shape[0] for linear in linears}.items())
            elif calibration.batches:
                region.statistics = runner.collect(segment, by_weights(linears), calibration)
                for known in region.statistics.values():
                    self.report.rows = _rows(known).joined(self.report.rows)
        watched = [pair for p in self.passes if Reads.CHANNELS in p.reads for pair in p.watched(region).items()]
        if watched and calibration.batches and not self.guess:
            runner.observe(segment, {}, calibration, more=watched)
        with phase("float outputs"):
            before = runner.outputs(segment, checks, original=True, beside=beside)
        for rewrite in self.passes:
            promises.run(rewrite, region)
        segment.nodes[:] = region.live_nodes()
        products = Products(segment.nodes, self.int8 if int8 else None, share=self.share)
        with phase("probes"):
            after = runner.outputs(segment, checks, original=False, prepare=products.add, each=products.take)
            self.report.nodes += products.errors()
        give_back()
        checks.original = went_on(segment, checks.original, before)
        checks.quantized = went_on(segment, checks.quantized, after)
        own = {str(value.name) for value in self.model.graph.outputs}
        for kept, a, b in zip(outputs, after, before, strict=True):
            kept[0].update((name, array) for name, array in a.items() if name in own)
            kept[1].update((name, array) for name, array in b.items() if name in own)


def told(model: ir.Model, plan: InputPlan) -> list[str]:
    """The outputs whose errors are told: all floats, a decoder's logits first."""
    floats = [v.name or "" for v in model.graph.outputs if v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    return sorted(floats, key=lambda name: name != plan.logits)


def told_of_caches(plan: InputPlan, data: Data, coded: Sequence[Arrays], floats: Sequence[Arrays]) -> str:
    """What codes in caches change in the outputs of a model with float ones; empty where no cache is codes."""
    kinds = {pair.codes.dtype for pair in plan.past if pair.codes is not None}
    told = "half precision" if kinds == {ir.DataType.FLOAT16} else "codes"
    count = sum(pair.codes is not None for pair in plan.past)
    compared = compare_outputs(coded, floats) if count else []
    first = next((own for own in compared if own.name == plan.logits), compared[0] if compared else None)
    if first is None:
        return ""
    found = predictions(plan, data.checks, coded, floats) if data.real else None
    added = f", {found.kl:.2g} nats a token of KL" if found is not None else ""
    return f"{count} of {len(plan.past)} in {told}, which alone change {first.name} by {first.relative:.2g}{added}"


def _rows(known: Statistics) -> RowsSeen:
    held = int(known.aside.sum())
    return RowsSeen((known.rows, known.rows), (held, held))


def by_weights(linears: Iterable[Linear]) -> list[list[ir.Value]]:
    """The activations of linears, in groups that the same weights multiply: one Gram matrix says all of each group.

    A group of several is what an unrolled loop, or layers that share their weights, give.
    """
    weights: dict[ir.Value, dict[tuple[ir.Value, bool], None]] = {}
    for linear in linears:
        weights.setdefault(linear.activation, {})[linear.weight, linear.transposed] = None
    groups: dict[frozenset[tuple[ir.Value, bool]], list[ir.Value]] = {}
    for value, own in weights.items():
        groups.setdefault(frozenset(own), []).append(value)
    return list(groups.values())


def seen_in(segments: Sequence[Segment], watched: Mapping[ir.Value, Observer]) -> list[dict[ir.Value, Observer]]:
    """By segment, the observed values that it shows: those it computes; what none computes, the first one to read it.

    Every value is shown once. The time is linear in the nodes.
    """
    home = {node: number for number, segment in enumerate(segments) for node in segment.nodes}
    shown: list[dict[ir.Value, Observer]] = [{} for _ in segments]
    for value, observer in watched.items():
        producer = value.producer()
        if producer in home:
            number = home[producer]
        else:
            number = min((home[use.node] for use in value.uses() if use.node in home), default=0)
        shown[number][value] = observer
    return shown
