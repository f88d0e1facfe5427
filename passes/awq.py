"""Activation-aware weight quantization: scale salient channels up before rounding (Lin et al. 2023)."""

from collections.abc import Set
from typing import ClassVar

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.pairs import find_pairs
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import Rounding
from qcompile.passes.scale_search import Choice, Judge, Judges, fold_choice, normalized, search_all, weight_power
from qcompile.passes.state import set_weight
from qcompile.passes.statistics import Statistics

_SAMPLES = 192
_FINALISTS = 3
# Exponents of the weight's root mean square: none, as in the paper's text, or a half.
_WEIGHT_EXPONENTS = (0.0, 0.5)
_LARGEST = 0.8


_MOST_POINTS = 1000


class Awq(Pass):
    """Scale salient input channels by activation magnitude, searched on a grid by the exact output error.

    Each pair (see `pairs`) is divided by s = E[x²]^(beta / 2) / E[w²]^(gamma / 2) per channel, where that lowers the
    output error after `rounding`.
    grid: number of betas, evenly spaced up to 0.8; each is tried with gamma 0 and 0.5.
    clip: let `pack` clip the range of each group, column by column where that lowers the output error.
    insert_mul: where no constant can absorb the factor, add a Mul (which costs run time).
    """

    name: ClassVar[str] = "awq"
    reads: Set[Reads] = frozenset({Reads.SCALES})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.CLIP})

    def __init__(
        self,
        policy: Policy,
        rounding: Rounding,
        *,
        grid: int = 8,
        clip: bool = True,
        insert_mul: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= grid <= _MOST_POINTS:
            limit = "least 1" if grid < 1 else f"most {_MOST_POINTS}"
            raise UserError(f"awq: grid must be at {limit}, got {grid}")
        self.policy, self.rounding, self.grid, self.seed = policy, rounding, grid, seed
        self.clip, self.insert_mul = clip, insert_mul

    def call(self, region: Region) -> None:
        """Choose all factors on the region as it is, fold them, and mark the weights whose ranges may be clipped."""
        pairs, skipped = find_pairs(region, insert=self.insert_mul)
        self.decisions += skipped
        known = (region, self.policy, self.rounding)
        judges = Judges(*known, samples=_SAMPLES, weigh=weight_power, seed=self.seed)
        choices = search_all(pairs, judges, self._search)
        for pair, choice in zip(pairs, choices, strict=True):
            self.decisions.append(fold_choice(pair, choice, region, nothing="no scale lowers the output error"))
        self._mark(region)

    def _mark(self, region: Region) -> None:
        vocabulary = region.vocabulary
        for linear in find_linears(region.live_nodes()):
            if not isinstance(self.policy.for_linear(linear, vocabulary), str):
                set_weight(linear.weight, clip=self.clip)

    def _search(self, judge: Judge) -> Choice | None:
        betas = [_LARGEST / self.grid * (i + 1) for i in range(self.grid)]

        def candidates(statistics: Statistics) -> dict[str, Array]:
            energy = judge.shared.pool_mean(statistics.energy)
            exponents = [(beta, gamma) for beta in betas for gamma in _WEIGHT_EXPONENTS]
            return {f"beta={b:.3g} gamma={g:g}": awq_factor(energy, judge.weight, b, g) for b, g in exponents}

        return judge.best(candidates, finalists=_FINALISTS)


def awq_factor(energy: Array, power: Array, beta: float, gamma: float) -> Array:
    """s = E[x²]^(beta / 2) / E[w²]^(gamma / 2), geometric mean 1, float32 (K,); 1 for channels that are always zero."""
    dead = (energy == 0) | (power == 0)
    with np.errstate(divide="ignore"):
        factor = energy ** (beta / 2) / power ** (gamma / 2)
    return normalized(np.where(dead, 0, factor))
