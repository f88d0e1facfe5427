"""What each unit may become: formats, with their sizes and what they are foretold to change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.facts.model import versions
from qcompile.compiler.mixed.ranking import Ranking, RankingCache
from qcompile.compiler.mixed.windows import bounding_windows
from qcompile.compiler.plan import effective, has_format, make_policy
from qcompile.compiler.recipe import SETTINGS, Recipe, parse_passes, parse_step
from qcompile.compiler.settings.bound import Bound
from qcompile.compiler.stages import Prepared, gather_data
from qcompile.compiler.sweep.budget.allocate import Option
from qcompile.compiler.sweep.budget.effects import errors, measurable, measured
from qcompile.compiler.sweep.budget.rounded import rounded_by, rounding_of, turns
from qcompile.compiler.sweep.budget.units import Site, Unit
from qcompile.passes import lists
from qcompile.passes.affine import Grid
from qcompile.passes.errors import UserError
from qcompile.passes.exact import quoted
from qcompile.passes.formats import named as by_name
from qcompile.passes.linears import Embedding, is_lm_head
from qcompile.passes.targets import TARGETS

# What `gptq` leaves of errors where rows share a code, over what it leaves of others that are as large when rounded to
# nearest: rows of one code do not make up for each other. SmolLM2-135M by `rotate,gptq,pack`, KL on the windows that
# units are measured on, over what is foretold of it without this: int4 in groups of 64 1.00, pairs of 4, 3 and 2.5 bits
# 1.09, 1.15 and 1.21. Gemma 3 270M, pairs of 3.5 bits: 1.10; MiniLM, 3 and 3.5 bits: 1.04 (accuracy-others.md).
_TOGETHER = 1.15
# What all weights together change at least, as a share of what was measured: those that changed nothing on a few
# windows, such as experts without a token, get the bytes that nothing else wants, and a bound can ask for them.
_LEAST = 1e-6


def with_formats(recipe: Recipe, units: Iterable[Iterable[str]], formats: Iterable[str]) -> Recipe:
    """The recipe, with a format for every weight of each unit by its very name."""
    given = [f"{quoted(name)}={own}" for names, own in zip(units, formats, strict=True) for name in names]
    return replace(recipe, weights_of=(*recipe.weights_of, *given))


def measuring(recipe: Recipe) -> Recipe:
    """A recipe whose data is gathered as for choices by measured errors: with a node to keep, for any list."""
    asked = {name: getattr(recipe, name) for name in ("include", "exclude", "samples", "context", "seed", "provider")}
    return Recipe(passes=parse_passes(lists.INTEGER), keep_worst=1, **asked)


def taken(recipe: Recipe, vocabulary: int | None, site: Site) -> bool:
    """Whether the recipe says the format of a site: by a pattern, or as lm_head or embedding unless by default."""
    policy = make_policy(recipe)
    if isinstance(site, Embedding):
        own, given = policy.of(site.node, site.table), "embedding"
    else:
        own, given = policy.of(site.node, site.weight), "lm_head" if is_lm_head(site, vocabulary) else ""
    return own is not None or (bool(given) and getattr(recipe, given) != SETTINGS[given].default)


def choices_of(recipe: Recipe, units: Sequence[Unit], vocabulary: int | None) -> list[dict[str, list[Grid]]]:
    """Of each unit, the grids of its sites in every format that the target has for all of them."""
    made: list[dict[str, list[Grid]]] = [{} for _ in units]
    offered = [step for step in map(parse_step, lists.CANDIDATES) if has_format(step, TARGETS[recipe.target])]
    for step in offered:
        named = with_formats(recipe, [unit.names_of_weights for unit in units], [str(step)] * len(units))
        policy = make_policy(effective(named))
        for own, unit in zip(made, units, strict=True):
            grids = unit.grids(policy, vocabulary)
            if not isinstance(grids, str) and not _refused(unit, grids, recipe):
                own[str(step)] = grids
    if all(len(own) <= 1 for own in made):
        told = " and ".join(dict.fromkeys(step.name for step in offered)) if offered else "none"
        raise UserError(f"a budget has nothing to choose: of its formats target {recipe.target} has {told} alone")
    if lacking := next((unit for unit, own in zip(units, made, strict=True) if not own), None):
        raise UserError(f"a budget has no format for {lacking.names[0]} that target {recipe.target} takes: exclude it")
    return made


def ranking_of(
    prepared: Prepared,
    recipe: Recipe,
    calibration: Calibration,
    units: Sequence[Unit],
    progress: Progress,
    evaluation: Calibration | None,
    *,
    bound: Bound,
) -> Ranking:
    """The cached measurement, or a new one."""
    settings = prepared.recipe.to_dict() | {"budget": [list(unit.names_of_weights) for unit in units]}
    settings |= {"held": True} if bound else {}
    settings |= {"rounded": [str(step) for step in rounding_of(recipe)], "turned": turns(recipe)}
    key = prepared.source, prepared.report.source_hash, settings, versions(), calibration
    cache = RankingCache(*key, judged=evaluation is not None)
    known = cache.get()
    if known is None:
        data = gather_data(prepared, calibration, evaluation=evaluation, aside=True, bound=bool(bound))
        if bound:
            bounding_windows(prepared.plan, data, bound)
        measurable(prepared, data)  # rounding all weights may take hours
        probe = rounded_by(prepared, units, recipe, calibration, evaluation, progress, bound=bool(bound))
        known = measured(prepared, data, units, progress, probe)
        cache.put(known)
    return known


def options_of(
    recipe: Recipe, units: Sequence[Unit], choices: Sequence[Mapping[str, list[Grid]]], ranking: Ranking
) -> list[list[Option[str]]]:
    """Of each unit, in every format: its size, and what it changes."""
    half = make_policy(recipe).half_scales
    effects = {own.node: max(own.effect - ranking.all_float, 0.0) ** power(ranking) for own in ranking.nodes}
    least = _LEAST * (sum(effects.values()) or 1.0) / sum(unit.weights for unit in units)
    made = []
    for unit, grids in zip(units, choices, strict=True):
        sizes = [unit.bits(own, half_scales=half) / 8 for own in grids.values()]
        ratios = errors(unit, list(grids.values()), rotated=turns(recipe))
        together = [_TOGETHER if own[0].rows_per_code > 1 else 1.0 for own in grids.values()]
        effect = max(effects[unit.names_of_weights[0]], least * unit.weights)
        costs = [effect * a * b for a, b in zip(ratios, together, strict=True)]
        made.append([Option(name, *both) for name, *both in zip(grids, sizes, costs, strict=True)])
    return made


def power(ranking: Ranking) -> int:
    """Of what adds up: KL does, of independent errors the squares."""
    return 1 if ranking.metric == "KL" else 2


def _refused(unit: Unit, grids: Sequence[Grid], recipe: Recipe) -> bool:
    """Whether the target has no operator for one of the unit's products; or rows share codes, which are for nearly
    normal weights, and no pass makes them so, or not of a table.
    """
    if any(grid.rows_per_code > 1 for grid in grids) and (unit.embeddings or not turns(recipe)):
        return True
    pairs = zip(unit.linears, grids, strict=False)
    return any(by_name(grid.format).refusal(recipe.target, grid, own.shape[0]) for own, grid in pairs)
