"""The choice that is foretold to run fastest within a bound: the search of `allocate`, with microseconds for sizes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.files.given_json import read_json
from qcompile.compiler.plan import effective, make_policy
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.frontier import Times
from qcompile.compiler.results.timings import AGAIN, FLOAT, Product, Timings, check_complete
from qcompile.compiler.sweep.budget.allocate import Option, bytes_of, keeping
from qcompile.compiler.sweep.budget.stopwatch import TYPES, timed
from qcompile.compiler.sweep.budget.units import Unit
from qcompile.passes.affine import Grid
from qcompile.passes.errors import UserError
from qcompile.passes.linears import Linear, constant, find_linears, vocabulary_size

Options = Sequence[Sequence[Option[str]]]
# Products with their grids, None in float.
Parts = Sequence[tuple[Product, Grid | None]]
# Rows that a product is timed with: decoders write token by token, which takes most of their time; others see dozens of
# positions at once.
_TOKEN, _ROWS = 1, 64
# Times that differ by less are the same: medians of one product beside other work on a machine differ by as much.
_NOISE = 0.03
# What tells times.
_TABLE = "what `qcompile timings MODEL -o FILE` wrote on that machine"
# Steps that find what a byte must cost for a choice to be small enough, and what it costs at most, in microseconds.
_HALVINGS, _DEAREST = 24, 1e6


@dataclass(frozen=True)
class Clock:
    """Where times come from. file: a table of another machine. needed: choices are made by them, so that products are
    run here where there is no file; else what is known of this machine is told, where all of it is.
    """

    file: Path | None = None
    needed: bool = False


HERE = Clock()


@dataclass(frozen=True)
class Speeds:
    """Microseconds of a model's products. units: of each unit, by format, FLOAT where that is known. rest: of all
    others, whose format nothing chooses. file: of the table, where it was given.
    """

    table: Timings
    units: Sequence[Mapping[str, float]]
    rest: float
    file: str = ""

    def of(self, made: Sequence[Option[str]]) -> float:
        """All products, in the formats of a choice."""
        return self.rest + sum(own[one.what] for own, one in zip(self.units, made, strict=True))

    @property
    def floats(self) -> float | None:
        """All products, with units in float."""
        known = all(FLOAT in own for own in self.units)
        return self.rest + sum(own[FLOAT] for own in self.units) if known else None

    def told(self) -> Times:
        """For the record."""
        units = tuple(dict(own) for own in self.units)
        return Times(self.table.told, self.table.rows, self.floats, units, self.file)

    @property
    def levelled(self) -> list[dict[str, float]]:
        """The times of units, those that noise alone tells apart being the least of them."""
        return [_levelled(own) for own in self.units]


def speeds_of(
    model: ir.Model,
    recipe: Recipe,
    units: Sequence[Unit],
    choices: Sequence[Mapping[str, Sequence[Grid]]],
    clock: Clock,
    progress: Progress,
    *,
    decoder: bool,
) -> Speeds | None:
    """The times of all products of a model; None where they are neither given, nor known, nor to be measured.

    choices: of each unit, the grids of its sites by format. Formats that a given table has no time of are none of that
    machine's: units have none of them.
    Raises UserError where it lacks some products of a format that it has, or all that a unit may get.
    """
    each = [
        {FLOAT: _parts(unit, None, recipe), **{name: _parts(unit, own, recipe) for name, own in grids.items()}}
        for unit, grids in zip(units, choices, strict=True)
    ]
    others = list(_others(model, recipe, units))
    every = {product: grid for parts in (others, *(p for own in each for p in own.values())) for product, grid in parts}
    rows = _TOKEN if decoder else _ROWS
    if clock.file is not None:
        table = load_timings(clock.file, recipe.target, rows)
        each = _had(each, table, clock.file)
        needed = [others, *(parts for own in each for name, parts in own.items() if name != FLOAT)]
        check_complete(table, [product for parts in needed for product, _ in parts], clock.file)
    else:
        table = timed(every, recipe.target, rows, progress, measure=clock.needed)
        if table.lacking(every):
            return None
    made = [
        {name: _sum(table, parts) for name, parts in own.items() if not table.lacking(product for product, _ in parts)}
        for own in each
    ]
    return Speeds(table, made, _sum(table, others), "" if clock.file is None else str(clock.file))


def load_timings(path: Path, target: str, rows: int) -> Timings:
    """The table in a file that another machine wrote; UserError where it is none, or of something else."""
    read, told = read_json(path, "--for-machine", _TABLE), f"--for-machine {path}"
    try:
        made = Timings.from_dict(read)
    except ValueError as error:
        raise UserError(f"{told} is no table of times: {error}") from error
    if made.target != target:
        raise UserError(f"{told} is of target {made.target}, and this compile is for {target}")
    if made.rows != rows:
        raise UserError(f"{told} is of {made.rows} rows at a time, and this model is timed with {rows}")
    return made


def fastest(options: Options, speeds: Speeds, cost: float, size: float = math.inf) -> list[Option[str]]:
    """The choice that takes least time of those whose costs are no more together than `cost`, and whose sizes than
    `size`, as far as hulls have them; of the same time, the smallest. Where no costs are so low, the lowest; where no
    sizes are, what the dearest bytes leave.

    A byte costs time as well: nothing at first, and then as little as makes the choice small enough (Everett 1963).
    """
    times = speeds.levelled

    def priced(byte: float) -> list[Option[str]]:
        units = [
            [replace(own, size=known[own.what] + byte * own.size) for own in unit]
            for unit, known in zip(options, times, strict=True)
        ]
        return _smaller(options, times, with_sizes(options, keeping(units, cost)), cost)

    made, low, high = priced(0.0), 0.0, 1e-6
    if bytes_of(made) <= size:
        return made
    while bytes_of(made := priced(high)) > size and high < _DEAREST:
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        other = priced(middle)
        low, high, made = (low, middle, other) if bytes_of(other) <= size else (middle, high, made)
    return made


def by_time(options: Options, speeds: Speeds) -> list[list[Option[str]]]:
    """The options of units with their times for sizes."""
    return [
        [replace(own, size=known[own.what]) for own in unit]
        for unit, known in zip(options, speeds.levelled, strict=True)
    ]


def with_sizes(options: Options, made: Sequence[Option[str]]) -> list[Option[str]]:
    """A choice among priced options as it is among the plain ones."""
    return [next(own for own in unit if own.what == one.what) for unit, one in zip(options, made, strict=True)]


def _smaller(
    options: Options, times: Sequence[Mapping[str, float]], made: Sequence[Option[str]], cost: float
) -> list[Option[str]]:
    """The smallest choice that takes no unit more time and keeps the cost; the choice itself where none is smaller."""
    allowed = [
        [own for own in unit if known[own.what] <= known[one.what]]
        for unit, known, one in zip(options, times, made, strict=True)
    ]
    found = keeping(allowed, cost)
    return found if bytes_of(found) < bytes_of(made) else list(made)


def _levelled(times: Mapping[str, float]) -> dict[str, float]:
    made, least = dict[str, float](), -math.inf
    for name, own in sorted(times.items(), key=lambda item: item[1]):
        least = least if own <= least * (1 + _NOISE) else own
        made[name] = least
    return made


def _had(each: Sequence[Mapping[str, Parts]], table: Timings, file: Path) -> list[dict[str, Parts]]:
    """Without the formats that a table has no time of at all."""
    known = {name for own in each for name, parts in own.items() if any(product in table.times for product, _ in parts)}
    made = [{name: parts for name, parts in own.items() if not parts or name in known} for own in each]
    if any(not set(own) - {FLOAT} for own in made):
        told = f"--for-machine {file} has no time of any format that target {table.target} offers for some products"
        raise UserError(f"{told}: {AGAIN}")
    return made


def _sum(table: Timings, parts: Parts) -> float:
    return sum(table.times[product] for product, _ in parts)


def _parts(unit: Unit, grids: Sequence[Grid] | None, recipe: Recipe) -> Parts:
    """Its products; lookups read one row, which takes no time beside them."""
    given = [None] * len(unit.linears) if grids is None else grids[: len(unit.linears)]
    return [(_product(own, grid, recipe), grid) for own, grid in zip(unit.linears, given, strict=True)]


def _others(model: ir.Model, recipe: Recipe, units: Sequence[Unit]) -> Iterator[tuple[Product, Grid | None]]:
    """Products that are of no unit, as the recipe has them; those of other floats are not told of."""
    policy, vocabulary = replace(make_policy(effective(recipe)), blank=True), vocabulary_size(model)
    chosen = {own.node for unit in units for own in unit.linears}
    for own in find_linears(model.graph):
        if own.node not in chosen and _type(own) in TYPES:
            grid = policy.for_linear(own, vocabulary)
            plain = None if isinstance(grid, str) else grid
            yield _product(own, plain, recipe), plain


def _product(own: Linear, grid: Grid | None, recipe: Recipe) -> Product:
    activations = "auto" if grid is None or recipe.activation_bits is None else str(recipe.activation_bits)
    return Product(*own.shape, FLOAT if grid is None else str(grid), activations, _type(own))


def _type(own: Linear) -> str:
    """The type of what it multiplies, as numpy calls it."""
    return str(constant(own.weight).dtype.numpy())
