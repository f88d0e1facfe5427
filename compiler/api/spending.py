"""A recipe with a budget or a bound, and the one that it becomes for a model: with a format for every weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.compiler.api.data import twice
from qcompile.compiler.api.idle import says_some
from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.files.given_json import read_json
from qcompile.compiler.files.load import hash_and_check, load_model
from qcompile.compiler.pipeline import Chosen, rewrite_report
from qcompile.compiler.plan import bound_of, check_settings, effective, ensuring, is_spent
from qcompile.compiler.recipe import SETTINGS, Recipe
from qcompile.compiler.results.frontier import Frontier, Tried
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount, TooLarge
from qcompile.compiler.settings.bound import TooFar
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.sweep.budget.choose import Choice, Search, check_amount
from qcompile.compiler.sweep.budget.fastest import Clock
from qcompile.compiler.sweep.budget.prices import with_formats
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError, Verdict

# Compiles at most: sizes depend on data where channels stay in float, distances on how well codes are fitted.
_RUNS = 3
# What is aimed at, as a share of a bound, and in the last compile; and of the size, what a further compile is to save.
_AIM, _LAST_AIM, _WORTH = 0.97, 0.85, 0.99
# What draws a frontier.
_REPORT = "the report.json of a compile with --budget"


@dataclass(frozen=True)
class Spent:
    """What a compile takes: the recipe, its data, and what was chosen in it."""

    recipe: Recipe
    calibration: Calibration
    evaluation: Calibration | None
    chosen: Chosen


def spending(
    source: Path,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
    run: Callable[[Spent], Report],
    *,
    evaluation: Calibration | None = None,
    point: Frontier | None = None,
    machine: Path | None = None,
) -> Report:
    """What a compile makes of the recipe as it is where it has no budget and no bound; else of the one with the formats
    that are best within them (`budget.choose`), in `_RUNS` compiles at most.

    A file that is larger than its budget all the same is made again with what is known of that. A bound is compared on
    data held aside, and what is foretold of the next choice is scaled by that: the smallest that holds is kept.
    point: the frontier that the recipe's formats are of, where they were chosen before. machine: a table of times.
    Raises UserError where a file is too large each time, by how much, and Verdict where none holds the bound.
    """
    _check_machine(recipe, machine)
    if not is_spent(recipe):
        return run(Spent(recipe, calibration, evaluation, Chosen(frontier=point)))
    found = Chooser(source, recipe, calibration, progress, evaluation, machine)
    return _within(found, run, progress) if not found.bound else _keeping(found, run, progress)


class Chooser:
    """The choices for a recipe with a budget or a bound: `Search`, with what was asked for."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        calibration: Calibration,
        progress: Progress,
        evaluation: Calibration | None = None,
        machine: Path | None = None,
    ) -> None:
        check_settings(effective(recipe))
        self.bound, self._budget = bound_of(recipe), recipe.budget or ""
        self.amount = None if recipe.budget is None else Amount.parse(recipe.budget)
        self.fastest, self._machine = recipe.fastest and bool(self.bound), machine
        bare = replace(recipe.keeping_none if self.bound else recipe, budget=None)
        if not says_some(bare):  # nor may the target refuse what is no weight's
            bare = replace(bare, group_size=SETTINGS["group_size"].default)
        plain = effective(bare)
        if self.amount is not None:
            check_amount(plain, self.amount)
        rehearsed = rehearse(source, plain)
        if rehearsed.refusal:  # whatever formats are chosen, which takes its time
            raise (Verdict if rehearsed.report.coverage else UserError)(rehearsed.refusal)
        self._data, self._judged = twice(calibration), None if evaluation is None else twice(evaluation)
        self._asked, self.unforetold = bare, 0

        def size_of(own: Recipe) -> int:
            return rehearse(source, own).report.compiled_bytes

        self.size_of = size_of
        clock = Clock(machine, self.fastest)
        self.search = Search(
            source, plain, self._data, progress, size_of, evaluation=self._judged, bound=self.bound, clock=clock
        )

    def first(self) -> Choice:
        """Within the budget, and the smallest, or fastest, that is foretold to keep the bound."""
        return self.within() if not self.bound else self.keeping(_AIM * self.bound.distance)

    def within(self) -> Choice:
        """All that the budget allows."""
        assert self.amount is not None
        return self.search.within(self.amount, self.unforetold)

    def keeping(self, change: float) -> Choice:
        """The smallest, or fastest, that is foretold to change no more; with a budget, no more than that."""
        if self.amount is None:
            return self.search.keeping(change)
        return self.search.keeping_within(change, self.amount, self.unforetold)

    def price(self, made: Choice) -> float:
        """Foretold, what is to be little: bytes of the model's files, or microseconds."""
        return self.search.price(made, self.unforetold)

    def told_price(self, made: Choice) -> str:
        """The same in words."""
        return self.search.told_price(made, self.unforetold)

    def is_last(self, made: Choice) -> bool:
        """Whether nothing better is allowed."""
        return self.search.is_largest(made) or (self.amount is not None and made == self.within())

    def missed(self, size: int, made: Choice) -> int:
        """Bytes that were not foretold, of a file that was made."""
        self.unforetold = max(self.unforetold, size - self.size_of(self.search.recipe_of(made)))
        return self.unforetold

    def spent(self, made: Choice, tried: tuple[Tried, ...] = ()) -> Spent:
        """What is compiled for a choice."""
        parts = [f"budget {self.amount}" if self.amount else "", str(self.bound), "fastest" if self.fastest else ""]
        words = " and ".join(filter(None, parts))
        drawn = replace(self.search.frontier_with(made, self._asked, self.unforetold), tried=tried)
        chosen = Chosen(f"{words}: {self.search.told(made)}", self._budget, self.bound, drawn)
        return Spent(self.search.recipe_of(made), self._data, self._judged, chosen)


def _within(found: Chooser, run: Callable[[Spent], Report], progress: Progress) -> Report:
    """The best within a budget."""
    for left in reversed(range(_RUNS)):
        made = found.within()
        try:
            return run(found.spent(made))
        except TooLarge as error:
            if not left:
                raise
            progress.step(_again(found.missed(error.size, made)))
    raise AssertionError("the last run returns or raises")


def _again(missed: int) -> str:
    return f"again with less for weights, {megabytes(missed)} were not foretold"


def _keeping(found: Chooser, run: Callable[[Spent], Report], progress: Progress) -> Report:
    """The smallest that keeps a bound, as far as `_RUNS` compiles tell."""
    tried, kept, made = list[Tried](), None, found.first()
    price = math.inf  # foretold, of what is kept
    for left in reversed(range(_RUNS)):
        try:
            kept = run(found.spent(made, tuple(tried)))
            assert kept.frontier is not None
            tried, price = list(kept.frontier.tried), found.price(made)
        except TooFar as error:
            search = found.search
            tried.append(Tried(error.size, search.change(made), error.distance, search.microseconds(made)))
            if kept is None and (not left or found.is_last(made)):
                raise _refused(found, tried, made) from error
        except UserError as error:
            if kept is not None:  # what holds stays, whatever is wrong with a smaller one
                progress.step(f"{found.bound}: kept as it is, another one is refused: {error}")
                break
            if not isinstance(error, TooLarge) or not left:
                raise
            progress.step(_again(found.missed(error.size, made)))
            made = found.keeping(found.search.change(made))
            continue
        aim = (_AIM if left > 1 else _LAST_AIM) * found.bound.distance
        following = found.keeping(_next(tried, aim))
        if following == made or not left or found.price(following) > _WORTH * price:
            break
        made = following
        progress.step(f"{found.bound}: again with {found.told_price(made)}")
    if kept is None:
        raise _refused(found, tried, made)
    if kept.frontier is not None and tried != list(kept.frontier.tried):
        kept.frontier = replace(kept.frontier, tried=tuple(tried))
        rewrite_report(kept)
    return kept


def _next(tried: list[Tried], aim: float) -> float:
    """The change to be foretold so that as much as is aimed at is measured: in proportion to the last try, or as powers
    of it go between the last two.
    """
    last, power = tried[-1], 1.0
    if len(tried) > 1 and min(own.change * own.distance for own in tried[-2:]) > 0:
        change, distance = (math.log(tried[-2].change / last.change), math.log(tried[-2].distance / last.distance))
        power = min(max(distance / change, 0.3), 3.0) if change else 1.0
    return last.change * (aim / last.distance) ** (1 / power) if last.distance else math.inf


def _refused(found: Chooser, tried: list[Tried], made: Choice) -> Verdict:
    """That no compile kept the bound, the last of a choice; which of budget and bound does not hold."""
    best = min(tried, key=lambda own: own.distance)
    told = f"{found.bound} does not hold: {found.search.told_of(best.distance)} with {megabytes(best.size)}"
    if found.search.is_largest(made):
        return Verdict(f"{told}, with the most bits for all weights: give a looser bound, or keep some with --exclude")
    if found.is_last(made):
        return Verdict(
            f"{told}, which is what the budget of {found.amount} allows: give a larger budget or a looser bound"
        )
    more = "a --budget larger than that" if found.amount is None else "no bound, for all that the budget allows"
    return Verdict(f"{told}, the best of {len(tried)} compiles: give a looser bound, or {more}")


def planned(
    source: Path,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
    *,
    evaluation: Calibration | None = None,
    point: Frontier | None = None,
    machine: Path | None = None,
) -> tuple[Recipe, Frontier | None]:
    """(the recipe that is compiled first, the frontier that it lies on; None where nothing is chosen).

    evaluation, point, machine: as in `spending`. Raises UserError where the point is of another model.
    """
    _check_machine(recipe, machine)
    if not is_spent(recipe):
        if point is not None:
            point.check_source(str(source), hash_and_check(source, load_model(source)))
        return recipe, point
    found = Chooser(source, recipe, calibration, progress, evaluation, machine)
    made = found.spent(found.first())
    return made.recipe, made.chosen.frontier


def _check_machine(recipe: Recipe, machine: Path | None) -> None:
    """UserError for a table of times where nothing is chosen."""
    if machine is not None and not is_spent(recipe):
        check_settings(effective(recipe))
        told = f"--for-machine {machine} tells of times where formats are chosen, and here are none to choose"
        chosen = f"--budget, --max-kl or --min-sqnr with a list that has {ensuring(Fact.PACKED)}"
        raise UserError(f"{told}: give {chosen}, or leave it out")


def check_bounds(models: Sequence[Path], recipe: Recipe) -> None:
    """UserError where a bound is not one for each of several models; the first would be compiled by then."""
    if len(models) < 2 or (recipe.max_kl is None and recipe.min_sqnr is None):
        return
    for path in models:
        try:
            prepare_model(path, recipe, Silent(), dry=True)
        except UserError as error:
            raise UserError(f"{path.name} of {len(models)} models: {error}, or compile them one by one") from error


def asked_for(
    file: Path | None, point: int | None, given: Mapping[str, Any], settings: object, plain: Callable[[], Recipe]
) -> tuple[Recipe, Frontier | None]:
    """(the recipe of a point of the frontier in a report, that frontier with the point chosen); without a file what is
    given `plain`.

    given: plain values of settings that stand before those that the report's compile was asked for. settings: others.
    """
    if file is None:
        if point is not None:
            raise UserError("--point is one of --budget-file FILE: give both")
        return plain(), None
    if settings is not None:
        raise UserError("--budget-file has the settings of its compile, and --recipe others: give one")
    drawn = load_frontier(file)
    if point is None:
        raise UserError(f"--budget-file {file} has points 1 to {len(drawn.points)}: choose one with --point")
    drawn, asked = drawn.at(point), dict(drawn.recipe)
    if (target := given.get("target", asked.get("target"))) != asked.get("target"):
        raise UserError(f"target {target}: the points of {file} are for target {asked.get('target')}")
    if twice := [name for name in ("budget", "max_kl", "min_sqnr", "fastest") if given.get(name)]:
        raise UserError(f"{twice[0]} chooses formats, and so does --budget-file: leave one of them out")
    recipe = Recipe.from_dict({**asked, **given}, str(file))
    return with_formats(recipe, drawn.units, drawn.points[point - 1].formats), drawn


def load_frontier(path: Path) -> Frontier:
    """The frontier in a report (`MODEL.report.json`), or in what `--dry-run --json` printed."""
    found = read_json(path, "--budget-file", _REPORT)
    plain = found.get("frontier") if isinstance(found, dict) else None
    if plain is None:
        raise UserError(f"--budget-file {path} has no frontier: give {_REPORT}")
    try:
        return Frontier.from_dict(plain)
    except ValueError as error:
        raise UserError(f"--budget-file {path} has a frontier of another version of qcompile") from error
