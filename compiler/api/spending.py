"""A recipe with a budget, and the one that it becomes for a model: with a format for every weight."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data import user_code
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import Files
from qcompile.compiler.data.readers import Batches, dicts, told
from qcompile.compiler.plan import effective
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount, TooLarge
from qcompile.compiler.sweep.budget.choose import choose

# Compiles at most: sizes depend on data where channels stay in float, and on nothing else that is not counted.
_RUNS = 3


@dataclass(frozen=True)
class Spent:
    """What a compile takes: the recipe, its calibration data, what was chosen, in words, and within which budget."""

    recipe: Recipe
    calibration: Calibration
    told: str = ""
    budget: str = ""


def spending(
    source: Path, recipe: Recipe, calibration: Calibration, progress: Progress, run: Callable[[Spent], Report]
) -> Report:
    """What a compile makes of the recipe as it is where it has no budget; else of the one with the formats that are
    best within it (`budget.choose`). Where its file is larger all the same, again with what is known of that.

    Raises UserError where it is too large each time, by how much.
    """
    if recipe.budget is None:
        return run(Spent(recipe, calibration))
    plain, data = effective(replace(recipe, budget=None)), _twice(calibration)

    def size_of(own: Recipe) -> int:
        return rehearse(source, own).report.compiled_bytes

    unforetold, amount = 0, Amount.parse(recipe.budget)
    for left in reversed(range(_RUNS)):
        made = choose(source, plain, amount, data, progress, size_of, unforetold=unforetold)
        try:
            return run(Spent(made.recipe, data, made.told, recipe.budget))
        except TooLarge as error:
            if not left:
                raise
            unforetold = max(unforetold, error.size - size_of(made.recipe))
            progress.step(f"again with less for weights, {megabytes(unforetold)} were not foretold")
    raise AssertionError("the last run returns or raises")


def _twice(calibration: Calibration) -> Calibration:
    """Data that can be read again: what a program's reader gives is kept in memory."""
    reference = Files.of([] if calibration.word else calibration.files).reference
    source = reference or calibration.reader
    if source is None:
        return calibration
    label = reference or str(getattr(source, "label", type(source).__name__))
    with told(label):
        given = user_code.found(reference, "--calibration") if reference else source
        items = [deepcopy(item) for item in dicts(given)]
    return replace(calibration, files=(), reader=Batches(label, items))
