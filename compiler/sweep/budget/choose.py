"""From an amount to a recipe that keeps within it: formats of all weights, by what each of them changes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.facts.model import versions
from qcompile.compiler.mixed.ranking import Ranking, RankingCache
from qcompile.compiler.plan import effective, ensuring, has_format, make_policy, steps_that
from qcompile.compiler.recipe import SETTINGS, Recipe, parse_passes, parse_step
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.stages import Prepared, gather_data, prepare_model
from qcompile.compiler.sweep.budget.allocate import Option, allocate
from qcompile.compiler.sweep.budget.effects import errors, measured
from qcompile.compiler.sweep.budget.units import Site, Unit, find_units
from qcompile.passes import lists
from qcompile.passes.affine import Grid
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.exact import quoted
from qcompile.passes.formats import named as by_name
from qcompile.passes.linears import Embedding, find_linears, is_lm_head, vocabulary_size
from qcompile.passes.rotation import Rotation
from qcompile.passes.table import PASSES
from qcompile.passes.targets import TARGETS

# Formats to choose from, of 3 bits and more: below, errors are too large for their sum to be what all change together.
FORMATS = ("int3(group=64)", "int4(group=64)", "int5(group=64)", "int6(group=64)", "int8(group=64)")
# Tries to bring the foretold size within the budget.
_TRIES = 8
# What a rehearsal of a file's size may be off by, which is left of a budget: a share, and bytes of small ones.
_SHARE, _BYTES = 0.002, 16_000
# Bytes at most of a node with the types of its outputs, but for names; and of a function.
_A_NODE, _A_FUNCTION = 250, 4_000


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
    *,
    unforetold: int = 0,
) -> Chosen:
    """Formats for all weights of a model file, with which it changes least within the amount.

    What a weight changes is measured alone (`effects.measured`; kept in the cache of rankings) and scaled by the errors
    of each format; changes add up. What the recipe keeps in float, or says the format of, stays as it is.
    Invariant: the policy of the recipe that is returned gives every unit the grids that were chosen for it.
    size_of: bytes of the model that a recipe will make, without its weights being read. unforetold: bytes by which it
    is known to be too low.
    Raises UserError where no choice is small enough, and for lists that do not pack.
    """
    _check(recipe, amount)
    prepared = prepare_model(source, _measuring(recipe), progress)
    vocabulary = vocabulary_size(prepared.model)
    units = find_units(prepared.model, make_policy(recipe), partial(_taken, recipe, vocabulary))
    if not units:
        raise UserError("a budget has nothing to choose: no weight is left that the recipe does not say all of")
    choices = _choices(recipe, units, vocabulary)
    ranking = _ranking(prepared, recipe, calibration, units, progress)
    options = _options(recipe, units, choices, ranking)
    counts = [unit.elements(next(iter(own.values()))) for unit, own in zip(units, choices, strict=True)]
    if amount.size is None:
        made = _within(options, (amount.bits or 0) / 8 * sum(counts), amount, counts)
    else:
        rest = max(added(prepared.model, recipe), unforetold)
        made = _sized(options, amount.size - rest, amount, counts, lambda own: size_of(_with(recipe, units, own)))
    named = _with(recipe, units, made)
    _check_grids(named, units, vocabulary, [own[told.what] for own, told in zip(choices, made, strict=True)])
    return Chosen(named, _told(amount, counts, made))


def _check(recipe: Recipe, amount: Amount) -> None:
    """UserError for lists of passes that a budget is not for."""
    if not steps_that(recipe, ensure=Fact.PACKED):
        told = f"a budget is for the weights of {ensuring(Fact.PACKED)}, and the passes are {_names(recipe)}"
        raise UserError(f"{told}: add it, or leave the budget out")
    marking = steps_that(recipe, ensure=Fact.OUTLIERS)
    if marking and amount.size is None:
        told = f"{marking[0].name} leaves channels in float by data, which no budget of bits a weight can count"
        raise UserError(f"{told}: give the size of the output, 80MB, or leave {marking[0].name} out")


def _sized(
    options: Sequence[Sequence[Option[str]]],
    size: float,
    amount: Amount,
    counts: Sequence[int],
    size_of: Callable[[Sequence[Option[str]]], int],
) -> list[Option[str]]:
    """The best choice whose foretold file is within a size, but for what a rehearsal may be off by."""
    usable = size - max(_SHARE * size, _BYTES)
    smallest = [min(own, key=lambda option: option.size) for own in options]
    rest = float(size_of(smallest)) - sum(own.size for own in smallest)
    _within(options, usable - rest, amount, counts, rest + (amount.size or 0) - size)
    for _ in range(_TRIES):  # nodes join by their formats, each of which has functions: that moves what is not weights
        made = allocate(options, usable - rest)
        if made is None:
            break
        excess = size_of(made) - usable
        if excess <= 0:
            return made
        rest += 1.1 * excess
    return smallest


def _measuring(recipe: Recipe) -> Recipe:
    """A recipe whose data is gathered as for choices by measured errors: with a node to keep, for any list."""
    asked = {name: getattr(recipe, name) for name in ("include", "exclude", "samples", "context", "seed", "provider")}
    return Recipe(passes=parse_passes(lists.INTEGER), keep_worst=1, **asked)


def _taken(recipe: Recipe, vocabulary: int | None, site: Site) -> bool:
    """Whether the recipe says the format of a site: by a pattern, or as lm_head or embedding unless by default."""
    policy = make_policy(recipe)
    if isinstance(site, Embedding):
        own, given = policy.of(site.node, site.table), "embedding"
    else:
        own, given = policy.of(site.node, site.weight), "lm_head" if is_lm_head(site, vocabulary) else ""
    return own is not None or (bool(given) and getattr(recipe, given) != SETTINGS[given].default)


def _choices(recipe: Recipe, units: Sequence[Unit], vocabulary: int | None) -> list[dict[str, list[Grid]]]:
    """Of each unit, the grids of its sites in every format that the target has for all of them."""
    made: list[dict[str, list[Grid]]] = [{} for _ in units]
    offered = [step for step in map(parse_step, FORMATS) if has_format(step, TARGETS[recipe.target])]
    for step in offered:
        named = _with(recipe, units, [Option(str(step), 0, 0)] * len(units))
        policy = make_policy(effective(named))
        for own, unit in zip(made, units, strict=True):
            grids = unit.grids(policy, vocabulary)
            if not isinstance(grids, str) and not _refused(unit, grids, recipe.target):
                own[str(step)] = grids
    if all(len(own) <= 1 for own in made):
        told = " and ".join(step.name for step in offered) if offered else "none"
        raise UserError(f"a budget has nothing to choose: of its formats target {recipe.target} has {told} alone")
    if lacking := next((unit for unit, own in zip(units, made, strict=True) if not own), None):
        raise UserError(f"a budget has no format for {lacking.names[0]} that target {recipe.target} takes: exclude it")
    return made


def _refused(unit: Unit, grids: Sequence[Grid], target: str) -> bool:
    """Whether the target has no operator for one of the unit's products."""
    pairs = zip(unit.linears, grids, strict=False)
    return any(by_name(grid.format).refusal(target, grid, own.shape[0]) for own, grid in pairs)


def _check_grids(recipe: Recipe, units: Sequence[Unit], vocabulary: int | None, chosen: Sequence[list[Grid]]) -> None:
    """The invariant of `choose`."""
    policy = make_policy(effective(recipe))
    for unit, wanted in zip(units, chosen, strict=True):
        if (given := unit.grids(policy, vocabulary)) != wanted:
            told = given if isinstance(given, str) else " and ".join(dict.fromkeys(map(str, given)))
            raise UserError(
                f"budget: {unit.names[0]} was to have {wanted[0]}, and the recipe gives it {told}: exclude it"
            )


def _ranking(
    prepared: Prepared, recipe: Recipe, calibration: Calibration, units: Sequence[Unit], progress: Progress
) -> Ranking:
    """The cached measurement, or a new one."""
    settings = prepared.recipe.to_dict() | {"budget": [list(unit.names_of_weights) for unit in units]}
    cache = RankingCache(prepared.source, prepared.report.source_hash, settings, versions(), calibration)
    known = cache.get()
    if known is None:
        known = measured(prepared, gather_data(prepared, calibration), units, progress)
        cache.put(known)
    return known


def _options(
    recipe: Recipe, units: Sequence[Unit], choices: Sequence[Mapping[str, list[Grid]]], ranking: Ranking
) -> list[list[Option[str]]]:
    """Of each unit, in every format: its size, and what it changes."""
    half = make_policy(recipe).half_scales
    power = 1 if ranking.metric == "KL" else 2  # of independent errors the squares add up
    effects = {own.node: max(own.effect - ranking.all_float, 0.0) ** power for own in ranking.nodes}
    made = []
    for unit, grids in zip(units, choices, strict=True):
        sizes = [unit.bits(own, half_scales=half) / 8 for own in grids.values()]
        ratios = errors(unit, list(grids.values()), rotated=_turns(recipe))
        costs = [effects[unit.names_of_weights[0]] * ratio for ratio in ratios]
        made.append([Option(name, *both) for name, *both in zip(grids, sizes, costs, strict=True)])
    return made


def _turns(recipe: Recipe) -> bool:
    return any(PASSES.required(step.name).turns for step in recipe.passes)


def added(model: ir.Model, recipe: Recipe) -> int:
    """Bytes that passes add at most which no rehearsal runs: matrices, and for each input that is turned a node, or the
    three of its body where the target has no such operator.
    """
    if not _turns(recipe):
        return 0
    inputs = {own.activation: own.shape[0] for own in find_linears(model.graph)}
    rotations = {len(own.signs) for k in inputs.values() if (own := Rotation.of(k, 0)) is not None}
    matrices = sum(4 * block**2 + _A_NODE for block in rotations)
    nodes = 1 if TARGETS[recipe.target].operators == "qcompile" else 3
    return matrices + _A_FUNCTION + nodes * sum(_A_NODE + 6 * len(str(value.name)) for value in inputs)


def _within(
    options: Sequence[Sequence[Option[str]]], size: float, amount: Amount, counts: Sequence[int], rest: float = 0.0
) -> list[Option[str]]:
    """The best choice; UserError where there is none. counts: weights of each unit. rest: bytes of all else."""
    made = allocate(options, size)
    if made is None:
        least = sum(min(option.size for option in own) for own in options)
        told = (
            f"{8 * least / sum(counts):.2f}bpw"
            if amount.size is None
            else megabytes(int(max((least + rest) / (1 - _SHARE), least + rest + _BYTES)))
        )
        raise UserError(f"budget {amount} is too small: with the smallest format of each weight it takes {told}")
    return made


def _with(recipe: Recipe, units: Sequence[Unit], made: Iterable[Option[str]]) -> Recipe:
    """The recipe, with a format for every weight of each unit by its very name."""
    given = [
        f"{quoted(name)}={own.what}" for unit, own in zip(units, made, strict=True) for name in unit.names_of_weights
    ]
    return replace(recipe, weights_of=(*recipe.weights_of, *given))


def _told(amount: Amount, counts: Sequence[int], made: Sequence[Option[str]]) -> str:
    """What was chosen, in words."""
    counted = Counter[str]()
    for count, own in zip(counts, made, strict=True):
        counted[own.what] += count
    shares = ", ".join(f"{counted[name] / sum(counts):.0%} {name}" for name in FORMATS if counted[name])
    return (
        f"budget {amount}: {8 * sum(own.size for own in made) / sum(counts):.2f} bits a weight, of the weights {shares}"
    )


def _names(recipe: Recipe) -> str:
    return ",".join(step.name for step in recipe.passes)
