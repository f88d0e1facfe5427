"""A compile rehearsed: what a recipe makes of every weight, and of which size, without data and without weights.

Invariant: the decisions are those of the compile, since the same passes make them on the same prepared graph, with
blank codes. The size is that of the files to 3 % or 16 KB. Neither knows what data decides: outlying channels, nodes
kept for their sensitivity, inputs that may be infinite, experts without a token.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.files.save import foretold_size
from qcompile.compiler.mixed.keep import integer_pass
from qcompile.compiler.mixed.sensitivity import sites
from qcompile.compiler.plan import bound_of, is_spent
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.report.coverage import account, check_coverage, in_order, quantizers
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.report import Report
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.compiler.stages import Prepared, halve_scales, prepare_model
from qcompile.compiler.walk.needs import Fed, foretold, load_of
from qcompile.compiler.walk.segments import split, targets
from qcompile.passes.base import Region
from qcompile.passes.contract import Stage
from qcompile.passes.errors import UserError

# Rows of a check batch, where the graph fixes no length.
CHECKED = 48


@dataclass(frozen=True, repr=False)
class Rehearsal(Shown):
    """What a compile would do; prints as a short table.

    report: sizes and decisions, as the compile will tell them. refusal: why the compile would write nothing.

    passes: all that run, in order. inputs: names of the graph's inputs. segments: of the calibration run. memory: bytes
    at its peak, about. disk: bytes beside the output, with what is put aside until it is written. open: what only data
    can tell. frontier: where formats were chosen by a budget or a bound.
    """

    report: Report
    refusal: str
    passes: tuple[str, ...]
    inputs: tuple[str, ...]
    segments: int
    memory: float
    disk: float
    open: tuple[str, ...]
    frontier: Frontier | None = None

    def sheet(self) -> Sheet:
        """Nodes by what would become of them, and what the compile would take."""
        report, made = self.report, self.report.sheet()
        title = f"{report.source}: {megabytes(report.source_bytes)} → about {megabytes(report.compiled_bytes)}"
        notes = [f"coverage: {report.told}", f"passes: {', '.join(self.passes)}"]
        notes.append(f"{self.segments} segments, about {self.memory / 1e9:.1f} GB of memory")
        notes += [f"only data tells {told}" for told in self.open]
        return replace(made, title=title, notes=[*notes, *([f"refused: {self.refusal}"] if self.refusal else [])])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as `qcompile --dry-run --json` has it, but for the output."""
        told = {
            "passes": self.passes,
            "segments": self.segments,
            "memory": int(self.memory),
            "disk": int(self.disk),
            "open": self.open,
        }
        drawn = {} if self.frontier is None else {"frontier": self.frontier.to_dict()}
        return {**told, "refusal": self.refusal, **drawn, "report": self.report.to_dict()}

    def records(self) -> list[dict[str, Any]]:
        """A row for each decision on a weight."""
        return self.report.records()


def rehearse(source: Path, recipe: Recipe) -> Rehearsal:
    """What the recipe would make of a model file. Raises UserError as the compile does, before its work."""
    if is_spent(recipe):
        told = str(bound_of(recipe)) if recipe.budget is None else "a budget"
        raise UserError(f"{told} is spent by `qcompile MODEL.onnx` and qcompile.compile alone")
    prepared = prepare_model(source, recipe, Silent(), dry=True)
    graph, report, own = prepared.model, prepared.report, quantizers(prepared.passes)
    segments = split(graph, targets(graph).__contains__)
    reads = any(p.reads for p in prepared.passes)
    texts, fixed = prepared.plan.batch or 1, prepared.plan.sequence
    batches = [Fed.of_texts(texts, fixed or prepared.recipe.context)] * -(-prepared.recipe.samples // texts)
    load = load_of(batches if reads else [], [Fed.of_texts(texts, fixed or CHECKED)] * 2)
    need = foretold(graph, prepared.passes, prepared.policy, load)
    if prepared.recipe.mixed:
        sites(integer_pass(prepared.passes), graph)
    inputs = tuple(given.name for given in prepared.plan.inputs)
    for late in own:
        late.dry = True
        if (own_policy := getattr(late, "policy", None)) is not None:
            late.policy = replace(own_policy, blank=True)  # type: ignore[attr-defined]
        whole = late.stage == Stage.BEHIND
        for region in [Region.whole(graph)] if whole else [Region(graph, segment.nodes) for segment in segments]:
            late.call(region)
        late.call_rest(graph)
    report.quantizers = tuple(p.name for p in own) or ("float",)
    report.decisions = {name: [] for name in report.quantizers}
    policy = getattr(own[0], "policy", prepared.policy) if own else prepared.policy
    made = account(prepared.constants, graph, prepared.passes, policy)
    report.decisions[report.quantizers[0]] = in_order(made, prepared.order)
    halve_scales(graph, prepared.recipe)
    report.compiled_bytes = foretold_size(graph)
    names = tuple(p.name for p in prepared.passes)
    return Rehearsal(report, _refusal(prepared), names, inputs, len(segments), need.memory, need.disk, _open(prepared))


def _refusal(prepared: Prepared) -> str:
    try:
        check_coverage(prepared.report, prepared.recipe.min_coverage, prepared.passes)
    except UserError as error:
        return str(error)
    return ""


def _open(prepared: Prepared) -> tuple[str, ...]:
    """What data decides, in words."""
    told = ["which nodes stay in float for their sensitivity"] if prepared.recipe.mixed else []
    return (*told, *(p.decided for p in prepared.passes if p.decided))
