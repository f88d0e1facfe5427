"""From an amount to a recipe that keeps within it: formats of all weights, by what each of them changes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.facts.model import versions
from qcompile.compiler.mixed.ranking import Ranking, RankingCache
from qcompile.compiler.plan import ensuring, grid, make_policy, steps_that
from qcompile.compiler.recipe import Recipe, Step, parse_passes, parse_step
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.stages import Prepared, gather_data, prepare_model
from qcompile.compiler.sweep.budget.allocate import Option, allocate
from qcompile.compiler.sweep.budget.effects import errors, measured
from qcompile.compiler.sweep.budget.units import Unit, find_units
from qcompile.passes import lists
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.formats import named
from qcompile.passes.table import PASSES

# Formats to choose from, of 3 bits and more: below, errors are too large for their sum to be what all change together.
FORMATS = ("int3(group=64)", "int4(group=64)", "int5(group=64)", "int6(group=64)", "int8(group=64)")
# Tries to bring the foretold size within the budget: nodes join by their formats, which moves what is not weights.
_TRIES = 5
# What a rehearsal of a file's size may be off by, which is left of a budget: a share, and bytes of small ones.
_SHARE, _BYTES = 0.002, 16_000


@dataclass(frozen=True)
class Chosen:
    """recipe: with a format for every weight that the budget covers. told: what was chosen, in words."""

    recipe: Recipe
    told: str


def choose(
    source: Path,
    recipe: Recipe,
    amount: Amount,
    calibration: Calibration,
    progress: Progress,
    size_of: Callable[[Recipe], int],
) -> Chosen:
    """Formats for all weights of a model file, with which it changes least within the amount.

    What a weight changes is measured alone (`effects.measured`; kept in the cache of rankings) and scaled by the errors
    of each format; changes add up. What the recipe keeps in float, or `weights_of` names, stays as it is.
    size_of: bytes of the model that a recipe will make, without its weights being read.
    Raises UserError where no choice is small enough, and for lists that do not pack.
    """
    if not steps_that(recipe, ensure=Fact.PACKED):
        told = f"a budget is for the weights of {ensuring(Fact.PACKED)}, and the passes are {_names(recipe)}"
        raise UserError(f"{told}: add it, or leave the budget out")
    prepared = prepare_model(source, _measuring(recipe), progress)
    units = _free(find_units(prepared.model, make_policy(recipe)), recipe)
    if not units:
        raise UserError("a budget has nothing to choose: no weight is left that the recipe does not say all of")
    steps = [step for step in map(parse_step, FORMATS) if _fits(step, recipe, units)]
    ranking = _ranking(prepared, recipe, calibration, units, progress)
    options = _options(recipe, units, steps, ranking)
    if amount.size is None:
        made = _within(options, (amount.bits or 0) / 8 * sum(unit.weights for unit in units), amount, units)
        return _chosen(recipe, amount, units, made)
    smallest = [min(own, key=lambda option: option.size) for own in options]
    usable = amount.size - max(_SHARE * amount.size, _BYTES)
    rest = size_of(_with(recipe, units, smallest)) - sum(own.size for own in smallest)
    for _ in range(_TRIES):
        made = _within(options, usable - rest, amount, units, rest)
        foretold = size_of(_with(recipe, units, made))
        if foretold <= usable:
            break
        rest += foretold - usable
    return _chosen(recipe, amount, units, made)


def _measuring(recipe: Recipe) -> Recipe:
    """A recipe whose data is gathered as for choices by measured errors: with a node to keep, for any list."""
    asked = {name: getattr(recipe, name) for name in ("include", "exclude", "samples", "context", "seed", "provider")}
    return Recipe(passes=parse_passes(lists.INTEGER), keep_worst=1, **asked)


def _free(units: Sequence[Unit], recipe: Recipe) -> list[Unit]:
    """Units whose weights a pattern can name, and none names yet."""
    policy = make_policy(recipe)
    sites = {unit: [(own.node, own.weight) for own in unit.linears] for unit in units}
    for unit in units:
        sites[unit] += [(own.node, own.table) for own in unit.embeddings]
    taken = {unit for unit in units if any(policy.of(node, value) is not None for node, value in sites[unit])}
    return [unit for unit in units if unit not in taken and not any("=" in name for name in unit.stored)]


def _fits(step: Step, recipe: Recipe, units: Sequence[Unit]) -> bool:
    """Whether the target has the format for all of them."""
    own = grid(step, recipe.target)
    return not any(named(step.name).refusal(recipe.target, own, k) for unit in units for k, _ in unit.shapes)


def _ranking(
    prepared: Prepared, recipe: Recipe, calibration: Calibration, units: Sequence[Unit], progress: Progress
) -> Ranking:
    """The cached measurement, or a new one."""
    settings = prepared.recipe.to_dict() | {"budget": [list(unit.stored) for unit in units]}
    cache = RankingCache(prepared.source, prepared.report.source_hash, settings, versions(), calibration)
    known = cache.get()
    if known is None:
        known = measured(prepared, gather_data(prepared, calibration), units, progress)
        cache.put(known)
    return known


def _options(recipe: Recipe, units: Sequence[Unit], steps: Sequence[Step], ranking: Ranking) -> list[list[Option[str]]]:
    """Of each unit, in every format: its size, and what it changes."""
    scale = np.float16 if recipe.scale_bits == 16 else np.float32
    grids = [grid(step, recipe.target).typed(scale) for step in steps]
    rotated = any(PASSES.required(step.name).turns for step in recipe.passes)
    power = 1 if ranking.metric == "KL" else 2  # of independent errors the squares add up
    effects = {own.node: max(own.effect - ranking.all_float, 0.0) ** power for own in ranking.nodes}
    made = []
    for unit in units:
        sizes = [sum(own.bits_per_weight(k) * k * n / 8 for k, n in unit.shapes) for own in grids]
        costs = [effects[unit.stored[0]] * ratio for ratio in errors(unit, grids, rotated=rotated)]
        made.append([Option(str(step), *both) for step, *both in zip(steps, sizes, costs, strict=True)])
    return made


def _within(
    options: Sequence[Sequence[Option[str]]], size: float, amount: Amount, units: Sequence[Unit], rest: float = 0.0
) -> list[Option[str]]:
    made = allocate(options, size)
    if made is None:
        least = sum(min(option.size for option in own) for own in options)
        count = sum(unit.weights for unit in units)
        told = (
            f"{8 * least / count:.2f}bpw"
            if amount.size is None
            else megabytes(int(max((least + rest) / (1 - _SHARE), least + rest + _BYTES)))
        )
        raise UserError(f"budget {amount} is too small: with the smallest format of each weight it takes {told}")
    return made


def _with(recipe: Recipe, units: Sequence[Unit], made: Sequence[Option[str]]) -> Recipe:
    given = [f"{name}={own.what}" for unit, own in zip(units, made, strict=True) for name in unit.stored]
    return replace(recipe, weights_of=(*recipe.weights_of, *given))


def _chosen(recipe: Recipe, amount: Amount, units: Sequence[Unit], made: Sequence[Option[str]]) -> Chosen:
    counted, count = Counter[str](), sum(unit.weights for unit in units)
    for unit, own in zip(units, made, strict=True):
        counted[own.what] += unit.weights
    shares = ", ".join(f"{counted[name] / count:.0%} {name}" for name in FORMATS if counted[name])
    bits = 8 * sum(own.size for own in made) / count
    return Chosen(_with(recipe, units, made), f"budget {amount}: {bits:.2f} bits a weight, of the weights {shares}")


def _names(recipe: Recipe) -> str:
    return ",".join(step.name for step in recipe.passes)
