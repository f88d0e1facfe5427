"""From an amount to a recipe that keeps within it: formats of all weights, by what each of them changes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.compiler.console.numbers import decibels, megabytes
from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.apart import digests
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.plan import effective, ensuring, make_policy, steps_that
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.frontier import Frontier, Point
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.settings.bound import NO_BOUND, Bound
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.sweep.budget.allocate import Option, allocate, bytes_of, frontier, keeping
from qcompile.compiler.sweep.budget.fastest import HERE, Clock, by_time, fastest, speeds_of, with_sizes
from qcompile.compiler.sweep.budget.prices import (
    choices_of,
    measuring,
    options_of,
    power,
    ranking_of,
    taken,
    with_formats,
)
from qcompile.compiler.sweep.budget.rounded import turns
from qcompile.compiler.sweep.budget.units import Unit, find_units
from qcompile.passes import lists
from qcompile.passes.affine import Grid
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears, vocabulary_size
from qcompile.passes.rotation import Rotation
from qcompile.passes.targets import TARGETS

# Tries to bring the foretold size within the budget.
_TRIES = 8
# What a rehearsal of a file's size may be off by, which is left of a budget: a share, and bytes of small ones.
_SHARE, _BYTES = 0.002, 16_000
# Bytes at most of a node with the types of its outputs, but for names; and of a function.
_A_NODE, _A_FUNCTION = 250, 4_000
# Points of a frontier beside the one that is chosen, and the share of its size within which there is no other.
_POINTS, _NEAR = 10, 0.02

Choice = Sequence[Option[str]]


class Search:
    """Formats for all weights of a model file: what each costs in bytes and in distance from the float model.

    What a weight changes is measured alone (`effects.measured`; kept in the cache of rankings) and scaled by the errors
    of each format; changes add up. What the recipe keeps in float, or says the format of, stays as it is.
    size_of: bytes of the model that a recipe will make, without its weights being read. bound: what is to hold, for
    which some of the data is left. evaluation: what the accuracy is told on. clock: where times of products come from.
    Raises UserError for lists that do not pack, for a bound of other kinds of models, and where there is nothing to
    choose.
    """

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        calibration: Calibration,
        progress: Progress,
        size_of: Callable[[Recipe], int],
        *,
        evaluation: Calibration | None = None,
        bound: Bound = NO_BOUND,
        clock: Clock = HERE,
    ) -> None:
        check_packs(recipe)
        prepared = prepare_model(source, measuring(recipe), progress)
        bound.check_metric(decoder=prepared.plan.logits is not None)
        self.recipe, self.source_hash = recipe, prepared.report.source_hash
        self._size_of, self._vocabulary = size_of, vocabulary_size(prepared.model)
        self._units, self._choices = chosen_of(prepared.model, recipe)
        self.speeds = speeds_of(
            prepared.model, recipe, self._units, self._choices, clock, progress,
            decoder=prepared.plan.logits is not None,
        )  # fmt: skip
        if self.speeds is not None:  # a table of another machine may lack some
            timed = zip(self._choices, self.speeds.units, strict=True)
            self._choices = [{name: grids for name, grids in own.items() if name in known} for own, known in timed]
        self._fast = self.speeds if clock.needed else None
        self.ranking = ranking_of(prepared, recipe, calibration, self._units, progress, evaluation, bound=bound)
        self.options = options_of(recipe, self._units, self._choices, self.ranking)
        self._counts = [u.elements(next(iter(own.values()))) for u, own in zip(self._units, self._choices, strict=True)]
        self._added = added(prepared.model, recipe)
        self._calibrated = digests(named(calibration.paths), calibration.texts)

    def within(self, amount: Amount, unforetold: int = 0) -> Choice:
        """The choice that changes least within the amount; UserError where none is small enough.

        unforetold: bytes by which `size_of` is known to be too low.
        """
        if amount.size is None:
            return _within(self.options, (amount.bits or 0) / 8 * sum(self._counts), amount, self._counts)
        usable = amount.size - max(self._added, unforetold)
        return sized(self.options, usable, amount, self._counts, lambda own: self._size_of(self._with(own)))

    def of_bytes(self, size: float) -> Choice | None:
        """The choice that changes least with so many bytes for its weights alone; None where none is small enough."""
        return allocate(self.options, size)

    def keeping(self, change: float) -> Choice:
        """The smallest choice of the frontier that is foretold to change no more, the fastest where that is asked for;
        the one that changes least, where none is.
        """
        return self._costing(change ** power(self.ranking))

    def _costing(self, cost: float) -> Choice:
        """The same by the sum of costs."""
        return keeping(self.options, cost) if self._fast is None else fastest(self.options, self._fast, cost)

    def keeping_within(self, change: float, amount: Amount, unforetold: int = 0) -> Choice:
        """The same of choices within the amount; all that it allows where none of them changes so little."""
        made = self.keeping(change)
        for _ in range(_TRIES):
            if self.fits(made, amount, unforetold):
                return made
            if self._fast is None:
                break
            room = self._room(made, amount, unforetold)
            made = fastest(self.options, self._fast, change ** power(self.ranking), room)
        return self.within(amount, unforetold)

    def _room(self, made: Choice, amount: Amount, unforetold: int) -> float:
        """Bytes of an amount that weights may take, where all else takes what it does beside a choice."""
        if amount.size is None:
            return (amount.bits or 0) / 8 * sum(self._counts)
        return amount.size - max(_SHARE * amount.size, _BYTES) - (self.size(made, unforetold) - bytes_of(made))

    def fits(self, made: Choice, amount: Amount, unforetold: int = 0) -> bool:
        """Whether a choice is foretold to be within the amount."""
        if amount.size is None:
            return self.bits(made) <= (amount.bits or 0)
        return self.size(made, unforetold) + max(_SHARE * amount.size, _BYTES) <= amount.size

    def is_largest(self, made: Choice) -> bool:
        """Whether no choice changes less."""
        return made == self._costing(-math.inf)

    def change(self, made: Choice) -> float:
        """Foretold: KL in nats a token, or a relative error."""
        return float(sum(own.cost for own in made) ** (1 / power(self.ranking)))

    def told_of(self, distance: float) -> str:
        """A distance with its unit."""
        return f"KL {distance:.3g} nats a token" if self.ranking.metric == "KL" else f"SQNR {decibels(distance):.1f} dB"

    def size(self, made: Choice, unforetold: int = 0) -> int:
        """Foretold, of the model's files."""
        return self._size_of(self._with(made)) + max(self._added, unforetold)

    def bits(self, made: Choice) -> float:
        """A weight, scales included."""
        return 8 * bytes_of(made) / sum(self._counts)

    def recipe_of(self, made: Choice) -> Recipe:
        """The recipe with the formats of a choice.

        Invariant: its policy gives every unit the grids that were chosen for it.
        """
        named = self._with(made)
        wanted = [own[told.what] for own, told in zip(self._choices, made, strict=True)]
        _check_grids(named, self._units, self._vocabulary, wanted)
        return named

    def told(self, made: Choice) -> str:
        """A choice in words."""
        counted = Counter[str]()
        for count, own in zip(self._counts, made, strict=True):
            counted[own.what] += count
        shares = ", ".join(
            f"{counted[name] / sum(self._counts):.0%} {name}" for name in lists.CANDIDATES if counted[name]
        )
        looked_up = any(
            grid.rows_per_code > 1 for own, o in zip(self._choices, made, strict=True) for grid in own[o.what]
        )
        slow = "; pairs take up to int8's time and memory, by the processor" if looked_up else ""
        speed = f"; products take {self.speeds.of(made):.0f} µs a run" if self.speeds is not None else ""
        return f"{self.bits(made):.2f} bits a weight, of the weights {shares}{slow}{speed}"

    def microseconds(self, made: Choice) -> float | None:
        """Foretold, of the products of a run; None where no times are known."""
        return None if self.speeds is None else self.speeds.of(made)

    def price(self, made: Choice, unforetold: int = 0) -> float:
        """What is to be as little as a bound allows: bytes of the model's files, or microseconds."""
        return self.size(made, unforetold) if self._fast is None else self._fast.of(made)

    def told_price(self, made: Choice, unforetold: int = 0) -> str:
        """The same in words."""
        size = megabytes(self.size(made, unforetold))
        return size if self._fast is None else f"{size} and {self._fast.of(made):.0f} µs a run"

    def frontier_with(self, made: Choice, asked: Recipe, unforetold: int = 0) -> Frontier:
        """Choices from the smallest to the largest, or from the fastest on, spread evenly by that, and the one that was
        made. asked: the recipe without a budget or a bound.
        """
        every, fast = self._every(), self._fast
        price: Callable[[Choice], float] = bytes_of if fast is None else fast.of
        prices, own = [price(other) for other in every], price(made)
        rest = self.size(made, unforetold) - bytes_of(made)
        wanted = np.linspace(prices[0], prices[-1], _POINTS)
        near = {int(np.abs(np.array(prices) - one).argmin()) for one in wanted}
        apart = _NEAR * (own + rest if fast is None else own)
        chosen = sorted([*(every[i] for i in sorted(near) if abs(prices[i] - own) > apart), made], key=price)
        points = [
            Point(
                round(bytes_of(one) + rest),
                self.bits(one),
                self.change(one),
                tuple(option.what for option in one),
                self.microseconds(one),
            )
            for one in chosen
        ]
        return Frontier(
            self.ranking.metric,
            self.ranking.windows,
            tuple(unit.names_of_weights for unit in self._units),
            tuple(points),
            1 + next(i for i, one in enumerate(chosen) if one is made),
            asked.to_dict(),
            self.source_hash,
            calibrated=self._calibrated,
            fastest=fast is not None,
            speeds=None if self.speeds is None else self.speeds.told(),
        )

    def _every(self) -> list[list[Option[str]]]:
        """The choices of the frontier: by bytes, or by time."""
        if self._fast is None:
            return frontier(self.options)
        return [with_sizes(self.options, made) for made in frontier(by_time(self.options, self._fast))]

    def _with(self, made: Choice) -> Recipe:
        return with_formats(self.recipe, [unit.names_of_weights for unit in self._units], [own.what for own in made])


def check_amount(recipe: Recipe, amount: Amount) -> None:
    """UserError for bits a weight of lists that leave some of it in float."""
    marking = steps_that(recipe, ensure=Fact.OUTLIERS)
    if marking and amount.size is None:
        told = f"{marking[0].name} leaves channels in float by data, which no budget of bits a weight can count"
        raise UserError(f"{told}: give the size of the output, 80MB, or leave {marking[0].name} out")


def chosen_of(model: ir.Model, recipe: Recipe) -> tuple[list[Unit], list[dict[str, list[Grid]]]]:
    """What formats are chosen for, and the grids of each unit's sites by format; UserError where there is nothing."""
    vocabulary = vocabulary_size(model)
    units = find_units(model, make_policy(recipe), partial(taken, recipe, vocabulary))
    if not units:
        told = f"no weight is left that target {recipe.target} packs and the recipe does not say all of"
        raise UserError(f"a budget has nothing to choose: {told}")
    return units, choices_of(recipe, units, vocabulary)


def check_packs(recipe: Recipe) -> None:
    """UserError for lists of passes that a budget is not for."""
    if not steps_that(recipe, ensure=Fact.PACKED):
        told = f"a budget is for the weights of {ensuring(Fact.PACKED)}, and the passes are {_names(recipe)}"
        if steps_that(recipe, ensure=Fact.INTEGER):
            raise UserError(f"{told}, whose integers have one size: min_sqnr and keep_worst choose what stays in float")
        raise UserError(f"{told}: add {ensuring(Fact.PACKED)}, or leave the budget out")


def sized(
    options: Sequence[Sequence[Option[str]]],
    size: float,
    amount: Amount,
    counts: Sequence[int],
    size_of: Callable[[Sequence[Option[str]]], int],
) -> list[Option[str]]:
    """The best choice whose foretold file is within a size, but for what a rehearsal may be off by.

    Nodes join by their formats, each of which has functions: that moves what is not weights. So what is taken off the
    size for that is too little or enough, and lies between the two until hardly anything is left over.
    """
    margin = max(_SHARE * size, _BYTES)
    usable, best = size - margin, [min(own, key=lambda option: option.size) for own in options]
    rest = float(size_of(best)) - bytes_of(best)
    _within(options, usable - rest, amount, counts, rest + (amount.size or 0) - size)
    little, enough = -math.inf, math.inf
    for _ in range(_TRIES):
        made = allocate(options, usable - rest)
        if made == best:  # nothing fits into what is left over
            break
        following = math.inf
        if made is None:
            enough = rest
        elif (excess := size_of(made) - usable) > 0:
            little, following = rest, rest + 1.1 * excess
        else:
            best, enough, following = made, rest, rest + 0.9 * excess
            if -excess <= margin:
                break
        rest = following if little < following < enough else (little + enough) / 2
    return best


def _check_grids(recipe: Recipe, units: Sequence[Unit], vocabulary: int | None, chosen: Sequence[list[Grid]]) -> None:
    """The invariant of `choose`."""
    policy = make_policy(effective(recipe))
    for unit, wanted in zip(units, chosen, strict=True):
        if (given := unit.grids(policy, vocabulary)) != wanted:
            told = given if isinstance(given, str) else " and ".join(dict.fromkeys(map(str, given)))
            raise UserError(
                f"budget: {unit.names[0]} was to have {wanted[0]}, and the recipe gives it {told}: exclude it"
            )


def added(model: ir.Model, recipe: Recipe) -> int:
    """Bytes that passes add at most which no rehearsal runs: matrices, and for each input that is turned a node, or the
    three of its body where the target has no such operator.
    """
    if not turns(recipe):
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


def _names(recipe: Recipe) -> str:
    return ",".join(step.name for step in recipe.passes)
