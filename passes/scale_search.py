"""Judging channel factors: the exact output error after the rounding that will follow, on a sample of columns.

A factor s (K,) turns weights W into s·W and the Gram matrix G into G / (s sᵀ), which leaves X W alone; what it changes
is the rounding. The loss of a linear is tr(Dᵀ G D) / tr(Wᵀ G W) with D = rounding(s·W) / s - W; a pair's is their mean
by width. Columns are rounded independently of each other, so a sample of them tells enough.

Where the activation is to be quantized, too, its rounding adds noise: evenly spread over a step of the grid that spans
all channels of X / s, independent of everything, so rows · step² / 12 · ‖s·W‖² / tr(Wᵀ G W).
"""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from qcompile.passes.affine import Array, output_error
from qcompile.passes.base import Decision, Region
from qcompile.passes.fold import fold, row_peaks
from qcompile.passes.pairs import Pair
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import Rounding, round_to_nearest
from qcompile.passes.spec import ActivationSpec, QuantSpec
from qcompile.passes.statistics import Statistics

# A factor must lower the sampled loss by this fraction to be kept: less is within the noise of the sample.
MARGIN = 0.005
# Factors lie within this range around their geometric mean.
_WIDEST = 1e3
_THREADS = 2


@dataclass(frozen=True)
class Choice:
    """A candidate's label, its factor (K,), and the sampled loss relative to no factor at all."""

    label: str
    factor: Array
    relative_loss: float

    @property
    def worth_it(self) -> bool:
        """Whether the factor beats doing nothing by more than the noise."""
        return self.relative_loss < 1 - MARGIN


@dataclass(frozen=True, eq=False)
class Judge:
    """The loss of a pair as a function of its factor.

    columns: for each spec, sampled weight columns of the linears that use it, float32 (K, n), at unit output power.
    grid: the grid of the activation, None where it stays in float.
    """

    pair: Pair
    statistics: Statistics
    rounding: Rounding
    columns: list[tuple[QuantSpec, Array]]
    grid: ActivationSpec | None = None

    def loss(self, factor: Array | None, rounding: Rounding | None = None) -> float:
        """Σ ‖X (Ŵ / s - W)‖² with the factor s (K,), None for all ones, after `rounding` (the judge's own)."""
        rounding = rounding or self.rounding
        statistics = self.statistics
        if factor is not None and rounding is not round_to_nearest:
            statistics = replace(statistics)
            statistics.rescale(factor)
        rows = np.ones((self.statistics.gram.shape[0], 1), np.float32) if factor is None else factor[:, None]
        total = 0.0
        for spec, w in self.columns:
            rounded = rounding(w * rows, spec, statistics).dequantize()
            total += output_error(rounded / rows - w, self.statistics.gram) + self._noise(w * rows, rows[:, 0])
        return total

    def _noise(self, w: Array, factor: Array) -> float:
        """‖N w‖² where N (rows, K) is what rounding X / factor to the grid adds."""
        if self.grid is None:
            return 0.0
        span = 2 * float((self.statistics.absmax / factor).max())
        step = span / (self.grid.qmax - self.grid.qmin)
        return self.statistics.rows * step**2 / 12 * float(np.square(w).sum())

    def best(self, candidates: Mapping[str, Array], *, finalists: int) -> Choice | None:
        """The candidate of least loss: plain rounding, which is cheap, names the finalists, `rounding` decides."""
        base = self.loss(None)
        if not candidates or not base > 0:
            return None
        if len(candidates) > finalists:
            screened = {label: self.loss(factor, round_to_nearest) for label, factor in candidates.items()}
            candidates = {label: candidates[label] for label in sorted(screened, key=screened.__getitem__)[:finalists]}
        losses = {label: self.loss(factor) for label, factor in candidates.items()}
        label = min(losses, key=losses.__getitem__)
        return Choice(label, candidates[label], losses[label] / base)


class Judges:
    """Makes the judge of a pair. samples: about how many columns it rounds for one candidate."""

    def __init__(
        self,
        region: Region,
        policy: Policy,
        rounding: Rounding,
        *,
        samples: int,
        seed: int,
        grid: ActivationSpec | None = None,
    ) -> None:
        self.statistics, self.rounding, self.samples, self.seed = region.statistics, rounding, samples, seed
        self.grid = grid
        self._policy, self._vocabulary = policy, region.vocabulary

    def __call__(self, pair: Pair) -> Judge | str:
        """The judge of a pair, or why there is nothing to judge."""
        statistics = self.statistics.get(pair.value)
        if statistics is None:
            return "its input was not observed"
        specs = [(linear, self._policy.for_linear(linear, self._vocabulary)) for linear in pair.linears]
        quantized = [(linear, spec) for linear, spec in specs if isinstance(spec, QuantSpec)]
        if not quantized:
            return f"none of its linears is quantized: {specs[0][1]}"
        rng = np.random.default_rng([self.seed, zlib.crc32(pair.name.encode())])
        fraction = min(1.0, self.samples / sum(linear.shape[1] for linear, _ in quantized))
        by_spec: dict[QuantSpec, list[Array]] = {}
        for linear, spec in quantized:
            n = linear.shape[1]
            chosen = np.sort(rng.choice(n, int(np.ceil(n * fraction)), replace=False))
            sample = _at_unit_output(linear.read()[:, chosen], statistics)
            by_spec.setdefault(spec, []).append(sample)
        columns = [(spec, np.concatenate(parts, axis=1)) for spec, parts in by_spec.items()]
        return Judge(pair, statistics, self.rounding, columns, self.grid)


def _at_unit_output(w: Array, statistics: Statistics) -> Array:
    """w (K, n) divided so that ‖X w‖² = n. Rounding follows a column's scale, so this only weighs linears equally."""
    power = output_error(w, statistics.gram) / w.shape[1]
    return w / np.float32(np.sqrt(power)) if power > 0 else w


def search_all(pairs: list[Pair], judges: Judges, search: Callable[[Judge], Choice | None]) -> list[Choice | str]:
    """For every pair its choice, or why it has none. Pairs are searched side by side; the order changes nothing."""

    def one(pair: Pair) -> Choice | str:
        judge = judges(pair)
        if isinstance(judge, str):
            return judge
        return search(judge) or "its inputs or weights are all zero, or rounding is exact"

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, pairs))


def fold_choice(pair: Pair, choice: Choice | str, region: Region, *, nothing: str | None) -> Decision:
    """Fold a pair's factor where there is one; the decision says which, or why not.

    nothing: the reason given where no candidate is worth it; None folds whatever was chosen.
    """
    linears = [linear.name for linear in pair.linears]
    if isinstance(choice, str):
        return Decision(pair.name, "skipped", choice, {"linears": linears})
    detail = {"kind": pair.kind, "linears": linears, "relative_loss": choice.relative_loss}
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
    return pair.pool_max(np.max([row_peaks(linear) for linear in pair.linears], axis=0))


def weight_power(pair: Pair) -> Array:
    """E[W²] of each input channel over the linears of the pair, pooled where channels share a factor; (K,)."""
    total = np.sum([np.square(linear.read()).sum(axis=1) for linear in pair.linears], axis=0)
    return pair.pool_mean(total / sum(linear.shape[1] for linear in pair.linears))
