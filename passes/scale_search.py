"""Judging channel factors: the exact output error after the rounding that will follow, on a sample of columns.

A factor s (K,) turns weights W into s·W and the Gram matrix G into G / (s sᵀ), which leaves X W alone; what it changes
is the rounding. The loss of a linear is tr(Dᵀ G D) / tr(Wᵀ G W) with D = rounding(s·W) / s - W; a pair's is their mean
by width. Columns are rounded independently of each other, so a sample of them tells enough. They are rounded as they
are: a grid whose scales are powers of two rounds a weight otherwise than three times the weight.

Where the activation is to be quantized, too, its rounding adds noise: evenly spread over a step of the grid that spans
all channels of X / s, independent of everything, so rows · step² / 12 · ‖s·W‖² / tr(Wᵀ G W).

Factors are made from some rows and judged on those and on others, held aside: what goes wrong for rows that were not
seen, such as a channel whose largest value is yet to come and will be clipped, shows there alone. A factor counts for
as much as the worse of the two says. The one that is kept is then made anew from all rows.

So it is with columns. The best of many candidates on some columns is partly the luckiest there: it is chosen by one
part of the sample, and what it gains is told by another that stands for all columns that were not chosen by, less a
little for those that are not in the sample at all.
"""

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, Grid, output_error
from qcompile.passes.base import Decision, Region
from qcompile.passes.channel_map import Indices
from qcompile.passes.fold import fold, row_peaks
from qcompile.passes.held import confirmed, too_few
from qcompile.passes.observers.room import RowExtremes
from qcompile.passes.pairs import Pair, Shared
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import Prepared, Rounding, by_input, round_to_nearest
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.statistics import Statistics
from qcompile.passes.workers import mapped

# A factor must lower the sampled loss by this fraction to be kept: less is within the noise of the sample.
MARGIN = 0.005
# Columns that say what a choice gains, beside those that it is made by: a share of these.
_OTHERS = 0.5
# Standard errors by which what these tell must be a gain: the least of 0, 0.1, 0.25 and 1 with which seeded layers gain
# on other columns (test_scale_search.py); compared on halves of the calibration text (docs/architecture.md).
_DEVIATIONS = 0.25
# Factors lie within this range around their geometric mean.
_WIDEST = 1e3
# One of so many columns names the finalists. Rounded as the list will, they cost 0.0001 of the best candidate's loss on
# SmolLM2's first layers, all columns rounded to nearest 0.04.
_SCREENED = 3
# Columns of several candidates that are rounded together.
_BESIDE = 1024


@dataclass(frozen=True)
class Choice:
    """A candidate's label, its factor (K,) from all rows, and the loss relative to no factor at all, as far as a sample
    of all columns tells it: the worse of that on the rows it was made from and that on rows held aside.

    tried: the loss of each finalist by its label, on the columns that it was chosen by.
    """

    label: str
    factor: Array
    relative_loss: float
    tried: Mapping[str, float] = field(default_factory=dict)

    @property
    def worth_it(self) -> bool:
        """Whether the factor beats doing nothing by more than the noise."""
        return self.relative_loss < 1 - MARGIN


# Candidate factors (K,) by label, made from the statistics of an activation.
Candidates = Callable[[Statistics], Mapping[str, Array]]


@dataclass(frozen=True, eq=False)
class _Loss:
    """Of some of the sampled columns.

    columns: ‖X (Ŵ / s - W)‖² with the noise of the activation, of each (n,), in units of its linear. held (h,): the
    same of each row held aside, over these columns, each as often as it stands for others.
    """

    columns: Array
    held: Array


@dataclass(frozen=True)
class _Grid:
    """limit: its end. beyond: how far rows go beyond it that do, and how rare they are: a share of all rows."""

    limit: float
    beyond: float
    rare: float


@dataclass(frozen=True, eq=False)
class Columns:
    """Sampled weight columns w, float32 (K, n), of linears that share a grid.

    unit (n,): what the squared error of a column counts, so that every linear counts by its width. stands (n,): for how
    many columns of its linear it tells.
    """

    spec: Grid
    w: Array
    unit: Array
    stands: Array

    def every(self, step: int) -> "Columns":
        """One of so many of the columns."""
        own = slice(None, None, step)
        return Columns(self.spec, np.ascontiguousarray(self.w[:, own]), self.unit[own], self.stands[own])


@dataclass(frozen=True, eq=False)
class Judge:
    """The loss of a pair as a function of its factor: plain values, nothing of a graph.

    shared: which channels have one factor.
    statistics: of all rows. fitted: of those that candidates are made from. held: the others (h, K); None where the
    statistics are guesses, so that nothing can be held aside.
    chosen, told: for each spec, columns of the linears that use it: those that candidates are chosen by, one by one,
    and those that tell of the choice for all others. The latter are looked at for the one that is chosen alone.
    grid: the grid of the activation, None where it stays in float.
    weight: what candidates are made of beside the activation, of each channel (K,).
    """

    shared: Shared
    statistics: Statistics
    fitted: Statistics
    held: Array | None
    rounding: Rounding
    chosen: list[Columns]
    told: list[Columns]
    grid: ActivationSpec | None = None
    weight: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    def losses(self, own: Array, sample: list[Columns]) -> "_Loss":
        """The losses of the factor s (K,) on a sample after `rounding`."""
        errors, held = [], np.zeros(0 if self.held is None else len(self.held), np.float32)
        grid = self._grid(own)
        rows = self.held if self.held is None else self._with_rare(self.held, own, grid)
        inputs = None if rows is None else self._on_grid(rows / own, grid.limit)
        for columns in sample:
            w = columns.w
            rounded, _, squares = self._rounded(w, own, columns.spec)
            errors.append(columns.unit * (squares + self._noise(w * own[:, None], own)))
            if inputs is not None and rows is not None:
                wanted = self._outputs[columns] if rows is self.held else rows @ w
                sums = np.square(inputs @ rounded - wanted) @ (columns.unit * columns.stands)
                known, rare = sums[: len(held)], sums[len(held) :]
                held += known if not rare.size else known + np.float32(grid.rare) * rare
        return _Loss(np.concatenate(errors).astype(np.float64), held)

    @cached_property
    def _outputs(self) -> dict[Columns, Array]:
        """What the rows held aside give by float columns, (h, n)."""
        return {} if self.held is None else {own: self.held @ own.w for own in (*self.chosen, *self.told)}

    def _grid(self, factor: Array) -> "_Grid":
        """That of X / factor which an observer of all rows would choose, symmetric."""
        end, sample = float((self.statistics.absmax / factor).max()), self.statistics.sample
        if self.grid is None or sample is None or not end > 0:
            return _Grid(end, 0.0, 0.0)
        known = RowExtremes.of(sample / factor).standing_for(self.statistics.rows)
        side = int((sample / factor).max() >= end)
        scale, room = known.scale(side, end), known.room(side, end)
        return _Grid(end + room, scale, known.beyond(room, scale))

    def _with_rare(self, rows: Array, factor: Array, grid: "_Grid") -> Array:
        """Rows (h, K), and with a grid the same as rows that go beyond it by as much as such rows do, (2 h, K): how
        many channels are cut off then depends on the factor.
        """
        if not grid.rare > 0:
            return rows
        peaks = np.abs(rows / factor).max(axis=1, keepdims=True)
        reach = np.divide(grid.limit + grid.beyond, peaks, out=np.zeros_like(peaks), where=peaks > 0)
        return np.concatenate([rows, rows * reach])

    def _step(self, factor: Array) -> float:
        assert self.grid is not None
        return 2 * float((self.fitted.absmax / factor).max()) / (self.grid.qmax - self.grid.qmin)

    def _noise(self, w: Array, factor: Array) -> Array | float:
        """‖N w‖² of each column, (n,), where N (rows, K) is what rounding X / factor to the grid adds."""
        if self.grid is None:
            return 0.0
        power = np.square(w, dtype=np.float64).sum(axis=0)
        return np.asarray(self.fitted.rows * self._step(factor) ** 2 / 12 * power)

    def _rounded(self, w: Array, own: Array, spec: Grid) -> tuple[Array, Array, Array]:
        """What columns w (K, n) with factor s, (K,) or of each column (K, n), are rounded to: Ŵ, D = Ŵ / s - W, and
        ‖X D‖² of each column (n,).
        """
        statistics, factor = self.fitted.rescaled(own), own.reshape(len(own), -1)
        if isinstance(self.rounding, Prepared):
            rounded, squares = self.rounding.told(w * factor, spec, statistics)
            return rounded, rounded / factor - w, squares
        rounded = self.rounding(w * factor, spec, statistics).dequantize()
        delta = rounded / factor - w
        return rounded, delta, self.fitted.squares(delta)

    def _on_grid(self, rows: Array, limit: float) -> Array:
        """Rows of X / factor on their grid; beyond it they clip."""
        if self.grid is None or not limit > 0:
            return rows
        most = (self.grid.qmax - self.grid.qmin) / 2
        step = np.float32(limit / most)
        return np.asarray(np.clip(np.rint(rows / step), -most, most) * step, np.float32)

    def best(self, candidates: Candidates, *, finalists: int) -> Choice | None:
        """The candidate of least loss. What is cheap names the finalists, `rounding` on all columns decides.

        Case 1: a rounding that takes each code by itself: plain rounding is like it.
        Case 2: one that makes codes follow each other: itself, on some of the columns.
        """
        made, one = candidates(self.fitted), np.ones(len(self.fitted.absmax), np.float32)
        if not made:
            return None
        if len(made) > finalists:
            tried = [one, *made.values()]
            if isinstance(self.rounding, Prepared):  # Case 2
                plain, *seen = self._each(tried, [own.every(_SCREENED) for own in self.chosen])
            else:
                plain, *seen = replace(self, rounding=round_to_nearest)._each(tried, self.chosen)
            if not plain.columns.sum() > 0:
                return None
            screened = {label: self._relative(own, plain) for label, own in zip(made, seen, strict=True)}
            made = {label: made[label] for label in sorted(screened, key=screened.__getitem__)[:finalists]}
        base, *found = self._each([one, *made.values()], self.chosen)
        if not base.columns.sum() > 0:
            return None
        losses = dict(zip(made, found, strict=True))
        relative = {own: self._relative(loss, base) for own, loss in losses.items()}
        label = min(relative, key=relative.__getitem__)
        return Choice(label, candidates(self.statistics)[label], self._left(made[label], losses[label], base), relative)

    def _each(self, factors: Sequence[Array], sample: list[Columns]) -> list["_Loss"]:
        """The losses of each factor; where the activation stays in float, of several at once, as columns beside each
        other, since a row of few columns is rounded no faster than one of many.
        """
        if isinstance(self.rounding, Prepared):
            for spec in dict.fromkeys(own.spec for own in sample):
                self.rounding.prepare(self.fitted, spec)
        if self.grid is not None:
            return mapped(_losses, factors, load=lambda own: (own,), given=(self, sample))
        together = max(1, _BESIDE // max(1, *(own.unit.size for own in sample)))
        parts = [factors[start : start + together] for start in range(0, len(factors), together)]
        found = mapped(_beside, parts, load=lambda own: (own,), given=(self, sample))
        return list(itertools.chain.from_iterable(found))

    def beside(self, factors: Sequence[Array], sample: list[Columns]) -> list["_Loss"]:
        """The same of several factors, where the activation stays in float."""
        count, held = len(factors), 0 if self.held is None else len(self.held)
        errors, rows = [list[Array]() for _ in factors], np.zeros((held, count), np.float32)
        for columns in sample:
            n = columns.unit.size
            w, own = np.tile(columns.w, count), np.repeat(np.stack(factors, axis=1), n, axis=1)
            _, delta, squares = self._rounded(w, own, columns.spec)
            for mine, found in zip(errors, columns.unit * squares.reshape(count, n), strict=True):
                mine.append(found)
            if self.held is not None:
                rows += np.square(self.held @ delta).reshape(held, count, n) @ (columns.unit * columns.stands)
        return [_Loss(np.concatenate(own).astype(np.float64), rows[:, i]) for i, own in enumerate(errors)]

    def _relative(self, after: "_Loss", before: "_Loss") -> float:
        """The loss by which a candidate is chosen."""
        whole = before.columns.sum()
        return self._worse(after.columns.sum() / whole if whole > 0 else 1.0, before.held, after.held)

    def _left(self, factor: Array, after: "_Loss", before: "_Loss") -> float:
        """What the chosen candidate leaves of the loss of all columns, most likely at most.

        after, before: of the columns that it was chosen by.
        """
        if not self.told:
            return self._relative(after, before)
        stands = np.concatenate([own.stands for own in self.told])
        others, plain = self._each([factor, np.ones_like(factor)], self.told)
        told, missing = stands * (others.columns - plain.columns), 1 - 1 / stands
        spread = np.square(told - told.mean()) * len(told) / (len(told) - 1) if len(told) > 1 else np.square(told)
        whole = before.columns.sum() + stands @ plain.columns
        bound = (after.columns - before.columns).sum() + told.sum() + _DEVIATIONS * np.sqrt(missing @ spread)
        left = 1 + bound / whole if whole > 0 else 1.0
        return self._worse(left, before.held + plain.held, after.held + others.held)

    def _worse(self, fitted: float | Array, before: Array, after: Array) -> float:
        return float(fitted if self.held is None else max(fitted, confirmed(before, after, self.statistics)))


def _losses(judge: Judge, sample: list[Columns], factor: Array) -> "_Loss":
    return judge.losses(factor, sample)


def _beside(judge: Judge, sample: list[Columns], factors: Sequence[Array]) -> list["_Loss"]:
    return judge.beside(factors, sample)


class Judges:
    """Makes the judge of a pair. samples: by about how many columns it chooses. weigh: what candidates take of its
    weights, for each channel (K,).
    """

    def __init__(
        self,
        region: Region,
        policy: Policy,
        rounding: Rounding,
        *,
        samples: int,
        weigh: Callable[[Pair], Array],
        seed: int,
        grid: ActivationSpec | None = None,
    ) -> None:
        self.statistics, self.rounding, self.samples, self.seed = region.statistics, rounding, samples, seed
        self.grid, self.weigh = grid, weigh
        self._policy, self._vocabulary = policy, region.vocabulary

    def __call__(self, pair: Pair) -> Judge | str:
        """The judge of a pair, or why there is nothing to judge."""
        statistics = self.statistics.get(pair.value)
        if statistics is None:
            return "its input was not observed"
        if reason := too_few(statistics):
            return reason
        specs = [(linear, self._policy.for_linear(linear, self._vocabulary)) for linear in pair.linears]
        quantized = [(linear, spec) for linear, spec in specs if isinstance(spec, Grid)]
        if not quantized:
            return f"none of its linears is quantized: {specs[0][1]}"
        rng = np.random.default_rng([self.seed, zlib.crc32(pair.name.encode())])
        fraction = min(1.0, self.samples / sum(linear.shape[1] for linear, _ in quantized))
        others = np.random.default_rng([self.seed, zlib.crc32(pair.name.encode()), 1])
        by_spec: dict[Grid, list[tuple[Columns, Columns]]] = {}
        for linear, spec in quantized:
            n = linear.shape[1]
            chosen = np.sort(rng.choice(n, int(np.ceil(n * fraction)), replace=False))
            left = np.delete(np.arange(n), chosen)
            told = np.sort(others.choice(left, min(len(left), int(np.ceil(len(chosen) * _OTHERS))), replace=False))
            sample = _sample(spec, linear.mapped(), chosen, told, statistics)
            by_spec.setdefault(spec, []).append(sample)
        first, others_of = (
            [_joined([part[i] for part in parts]) for parts in by_spec.values() if any(p[i].unit.size for p in parts)]
            for i in (0, 1)
        )
        fitted, held = statistics.split() or (statistics, None)
        known = (pair.shared, statistics, fitted, held, self.rounding, first, others_of)
        return Judge(*known, grid=self.grid, weight=self.weigh(pair))


def _sample(
    spec: Grid, w: npt.NDArray[np.floating], chosen: Indices, told: Indices, statistics: Statistics
) -> tuple[Columns, Columns]:
    """Columns of w (K, N) to choose by, and others that tell of the choice for all that are not among the former."""
    first, others = (np.asarray(w[:, own], np.float32) for own in (chosen, told))
    power = output_error(first, statistics.gram) / max(len(chosen), 1)
    unit, rest = 1 / power if power > 0 else 1.0, (w.shape[1] - len(chosen)) / max(len(told), 1)

    def part(own: Array, stands: float) -> Columns:
        weights = (np.full(own.shape[1], number, np.float32) for number in (unit, stands))
        return Columns(spec, own, *weights)

    return part(first, 1.0), part(others, rest)


def _joined(parts: list[Columns]) -> Columns:
    parts_of = ((own.w, own.unit, own.stands) for own in parts)
    first, *rest = (np.concatenate(own, axis=-1) for own in zip(*parts_of, strict=True))
    return Columns(parts[0].spec, first, *rest)


def search_all(pairs: list[Pair], judges: Judges, search: Callable[[Judge], Choice | str | None]) -> list[Choice | str]:
    """For every pair its choice, or why it has none. Pairs are searched side by side; the order changes nothing."""
    return by_input(
        searched, pairs, load=lambda pair: (judges(pair),), given=(search,), channels=lambda pair: len(pair.channels)
    )


def searched(search: Callable[[Judge], Choice | str | None], judge: Judge | str) -> Choice | str:
    """What the search finds, or why there is nothing to search."""
    if isinstance(judge, str):
        return judge
    return search(judge) or "its inputs or weights are all zero, or rounding is exact"


def fold_choice(pair: Pair, choice: Choice | str, region: Region, *, nothing: str | None) -> Decision:
    """Fold a pair's factor where there is one; the decision says which, or why not.

    nothing: the reason given where no candidate is worth it; None folds whatever was chosen.
    """
    linears = [linear.name for linear in pair.linears]
    if isinstance(choice, str):
        return Decision(pair.name, "skipped", choice, {"linears": linears})
    detail = {"kind": pair.kind, "linears": linears, "relative_loss": choice.relative_loss, "candidates": choice.tried}
    if nothing is not None and not choice.worth_it:
        return Decision(pair.name, "skipped", nothing, detail)
    fold(pair, choice.factor, region)
    return Decision(pair.name, "folded", choice.label, detail)


def normalized(factor: Array) -> Array:
    """The factor (K,) with geometric mean 1, kept in range; 1 where it says nothing (dead channels, zero weights)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.log(factor.astype(np.float64))
    usable = np.isfinite(logarithm)
    center = logarithm[usable].mean() if usable.any() else 0.0
    logarithm = np.where(usable, logarithm - center, 0.0)
    return np.asarray(np.exp(np.clip(logarithm, -np.log(_WIDEST), np.log(_WIDEST))), np.float32)


def weight_peaks(pair: Pair) -> Array:
    """max |W| of each input channel over the linears of the pair, pooled where channels share a factor; (K,)."""
    return pair.shared.pool_max(np.max([row_peaks(linear) for linear in pair.linears], axis=0))


def weight_power(pair: Pair) -> Array:
    """E[W²] of each input channel over the linears of the pair, pooled where channels share a factor; (K,)."""
    weights = (linear.read() for linear in pair.linears)
    total = np.sum([np.einsum("kn,kn->k", w, w) for w in weights], axis=0)
    return pair.shared.pool_mean(total / sum(linear.shape[1] for linear in pair.linears))
