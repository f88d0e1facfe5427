"""What hurts most, and the commands that may help: ranked nodes, and what to try, to be pasted."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.console.numbers import percent
from qcompile.compiler.plan import effective, ensuring, make_policy, steps_that
from qcompile.compiler.recipe import SETTINGS, Recipe
from qcompile.compiler.results.report import Report
from qcompile.passes import lists
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.exact import split_quoted
from qcompile.passes.formats import named
from qcompile.passes.targets import TARGETS

_RANKED = 5
# A share of all squared errors from which on a few nodes are worth leaving in float, and how many at most.
_ENOUGH, _FEW = 0.5, 3
# Group sizes to go down to, each from the one before.
_SMALLER = {0: 128, 256: 128, 128: 64, 64: 32}


@dataclass(frozen=True)
class Hurting:
    """A node among those that err most. share: of the squared errors of all nodes."""

    rank: int
    node: str
    told: str
    error: float
    share: float


@dataclass(frozen=True)
class Remedy:
    """Something to try: what it does, and the whole command."""

    what: str
    command: str


def hurting(report: Report) -> list[Hurting]:
    """The nodes of largest error by themselves, in falling order; none where no error was measured."""
    squares = [(own, own.error**2) for own in report.nodes if math.isfinite(own.error)]
    total = sum(square for _, square in squares)
    decisions = {d.node: d.told for d in report.quantizing}
    ranked = sorted(squares, key=lambda pair: (-pair[1], pair[0].node))[:_RANKED]
    return [
        Hurting(rank, own.node, decisions.get(own.node, ""), own.error, square / total)
        for rank, (own, square) in enumerate(ranked, 1)
        if total
    ]


def remedies(report: Report) -> list[Remedy]:
    """What to try, the cheapest in bytes first; none for a report without a recipe, or without errors."""
    worst, recipe = hurting(report), recipe_of(report)
    if not worst or recipe is None:
        return []
    integer = bool(steps_that(recipe, ensure=Fact.INTEGER))
    if not integer and not packs(report):
        return []
    tried = list(_of_integers(recipe, report) if integer else _of_weights(recipe, report))
    tried += _in_float(recipe, report, worst)
    return [Remedy(what, command(report, changes)) for what, changes in tried]


def recipe_of(report: Report) -> Recipe | None:
    """The recipe that ran; None where the report has none, or one of another version, or of packages that are gone."""
    try:
        made = Recipe.from_dict({k: v for k, v in report.recipe.items() if k in SETTINGS}, "report")
        make_policy(effective(made))
    except UserError:
        return None
    return made


def packs(report: Report) -> bool:
    """Whether the recipe stores weights in a form of its own settings: bits, groups, zero points."""
    recipe = recipe_of(report)
    return recipe is not None and bool(steps_that(recipe, ensure=Fact.PACKED))


def _of_integers(recipe: Recipe, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    nodes, products = report.nodes, bool(report.packed("MatMul"))
    own, marking = str(steps_that(recipe, ensure=Fact.INTEGER)[0]), ensuring(Fact.OUTLIERS)
    if not recipe.mixed and len(nodes) > 2 * _FEW:
        what = f"keep the {_FEW} nodes in float that change the output most (ranks them first)"
        yield what, {"keep_worst": _FEW}
    steps = [str(step) for step in recipe.passes]
    if marking not in steps and not TARGETS[effective(recipe).target].runtime and products:
        at = steps.index(own)
        yield "leave outlying channels of MatMuls in float", {"passes": [*steps[:at], marking, *steps[at:]]}


def _of_weights(recipe: Recipe, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    target = TARGETS[effective(recipe).target]
    best = lists.BEST.split(",")
    plain = {step.name for step in recipe.passes} <= {ensuring(Fact.CANONICAL), *lists.PLAIN.split(",")}
    if plain and recipe.weights is not None and named(recipe.weights.name).rows_per_code > 1:
        told = f"turn inputs of products, for which {recipe.weights.name} is meant (without data, the same size)"
        yield told, {"passes": lists.TURNED.split(",")}
    if not {step.name for step in recipe.passes} >= set(best):
        yield "fit codes to calibration data (slower to compile, the same size)", {"passes": best}
    if report.frontier is not None:
        return  # which settles groups and bits
    smaller = _SMALLER.get(recipe.group_size)
    if smaller and recipe.weights is None and (not target.groups or smaller in target.groups):
        yield f"groups of {smaller} rows share a scale, not {recipe.group_size or 'all'}", {"group_size": smaller}
    if recipe.bits < 8 and recipe.weights is None and 8 in target.bits:
        yield "8 bits for all weights (about twice the size)", {"bits": 8}


def _in_float(recipe: Recipe, report: Report, worst: Sequence[Hurting]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The few nodes that make up most of the error, or the worst one."""
    share, names = 0.0, list[str]()
    for own in worst[:_FEW]:
        share, names = share + own.share, [*names, _whole(report, own.node)]
        if share >= _ENOUGH:
            break
    chosen = list(dict.fromkeys(names)) if share >= _ENOUGH else names[:1]
    part = percent(share if share >= _ENOUGH else worst[0].share)
    told = f"leave {' and '.join(chosen)} in float: {part} of the squared errors of all nodes"
    yield told, {"exclude": [*recipe.exclude, *chosen]}


def _whole(report: Report, node: str) -> str:
    """The node of the model that a node is a part of, where a pass split it; the node itself else."""
    split = [own.node for made in report.decisions.values() for own in made if own.action == "split"]
    return max((name for name in split if node.startswith(f"{name}.")), key=len, default=node)


def command(report: Report, changes: dict[str, Any]) -> str:
    """The command that made a report, with other settings; formats that were chosen are left to what chose them."""
    source, output = report.asked or (report.source, report.output)
    words = ["qcompile", source]
    settings = {**report.recipe, **changes}
    if report.frontier is not None:
        said = [own for own in settings.pop("weights_of", ()) if split_quoted(own)[0] is None]
        settings |= {"weights_of": said, "budget": report.budget or None, **report.bound}
        settings |= {"fastest": True} if report.frontier.fastest else {}
        speeds = report.frontier.speeds
        if speeds is not None and speeds.file and (report.budget or report.bound):
            words += ["--for-machine", speeds.file]
        if not report.budget and not report.bound:  # of a point: the rest is in its file
            drawn = next(name for name in report.files if name.endswith(".report.json"))
            words += [
                "--budget-file",
                str(Path(report.output).with_name(drawn)),
                "--point",
                str(report.frontier.chosen),
            ]
            settings = {k: v for k, v in settings.items() if v != report.frontier.recipe.get(k)}
    for name, value in settings.items():
        own = SETTINGS.get(name)
        if own is not None and value != own.plain(own.default) and value is not None:
            words += _option(own.option, own.about.opposite, name, value)
    words += [*report.given, *(["-o", output] if output else [])]
    return shlex.join(words)


def _option(option: str, opposite: tuple[str, str] | None, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option] if value or opposite is None else [opposite[0]]
    if isinstance(value, list) and name != "passes":
        return [word for item in value for word in (option, str(item))]
    return [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
