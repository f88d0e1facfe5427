"""A recipe with a budget, and the one that it becomes for a model: with a format for every weight."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data import user_code
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import Files
from qcompile.compiler.data.readers import Batches, dicts, told
from qcompile.compiler.plan import effective
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.sweep.budget.choose import choose


@dataclass(frozen=True)
class Spent:
    """What a compile takes: the recipe, its calibration data, and what was chosen, in words."""

    recipe: Recipe
    calibration: Calibration
    told: str = ""


def spent(source: Path, recipe: Recipe, calibration: Calibration, progress: Progress) -> Spent:
    """The recipe as it is where it has no budget; else with the formats that are best within it (`budget.choose`)."""
    if recipe.budget is None:
        return Spent(recipe, calibration)
    plain, data = effective(replace(recipe, budget=None)), _twice(calibration)

    def size_of(own: Recipe) -> int:
        return rehearse(source, own).report.compiled_bytes

    made = choose(source, plain, Amount.parse(recipe.budget), data, progress, size_of)
    return Spent(made.recipe, data, made.told)


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
