"""SmoothQuant: migrate outliers from activations into weights, by constants only (Xiao et al. 2022)."""

from collections.abc import Set
from typing import ClassVar, Literal

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Reads
from qcompile.passes.errors import UserError
from qcompile.passes.held import FEWEST_KNOWN, known_channels
from qcompile.passes.pairs import find_pairs
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import Rounding
from qcompile.passes.scale_search import Choice, Judge, Judges, fold_choice, normalized, search_all, weight_peaks
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.statistics import Statistics

_ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8)
# Where activations are quantized, too, more of an outlier has to go. Above 0.85 the peaks of all channels seen in
# calibration come near the end of the grid together, and text not seen yet is cut off in many of them: SmolLM2 had a KL
# of 0.081 with alphas up to 1, of 0.065 with 0.8 alone, though the error predicted from the same data was smaller.
_INT8_ALPHAS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
_SAMPLES = 96
# The share of the squared output error that may be left where a Mul has to be inserted for it.
_WORTH_A_MUL = 0.5
_FINALISTS = 2
# Where few rows are to tell, what outliers are brought down to, in times of the largest value seen of other channels,
# which then are as far from the end of the grid; and by how much more the loudest stands out at least. With 1 instead
# of 4, and 2, a network of three linears lost 7 dB on rows to come: channels in the middle were cut off. So were they
# in a classifier of 192 channels, where outliers were as many as rows tell of, whether they stood out or not: 10 dB.
_SLACK, _STANDS_OUT = 4.0, 2.0


class Smooth(Pass):
    """Migrate activation outliers into the weights by SmoothQuant's factors, folded into constants.

    Each pair (see `pairs`) is divided by s = max|X|^alpha / max|W|^(1 - alpha) per channel.
    Case 1: alpha is a number in 0..1: every pair with a quantized linear is smoothed by it.
    Case 2: alpha is "auto": the alpha of least output error after `rounding`, and none where that is no gain.
    Case 3: no constant before the value can take the factor: with `insert` a Mul does, which costs run time, where it
            takes away half of the squared error and more. "auto" inserts where activations become integers.
    Case 4: before integers, and of fewer than four rows a channel, alpha "auto" brings channels that stand out, by four
            times from the next one, down to that, one for each four rows at most, and leaves all others; of fewer than
            32 rows all. Made even, all K channels would be cut off together by rows to come.
    """

    name: ClassVar[str] = "smooth"
    reads: Set[Reads] = frozenset({Reads.SCALES})

    def __init__(
        self,
        policy: Policy,
        rounding: Rounding,
        activations: ActivationSpec | None = None,
        *,
        alpha: float | Literal["auto"] = "auto",
        insert: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if alpha != "auto" and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
            raise UserError(f"smooth: alpha must be 'auto' or a number from 0 to 1, got {alpha!r}")
        self.policy, self.rounding, self.activations, self.alpha, self.seed = policy, rounding, activations, alpha, seed
        self.insert = activations is not None if insert == "auto" else insert

    def call(self, region: Region) -> None:
        """Choose all factors on the region as it is, then fold them."""
        pairs, skipped = find_pairs(region, insert=self.insert)
        self.decisions += skipped
        judges = Judges(
            region,
            self.policy,
            self.rounding,
            samples=_SAMPLES,
            weigh=weight_peaks,
            seed=self.seed,
            grid=self.activations,
        )
        choices = search_all(pairs, judges, self._search)
        for pair, choice in zip(pairs, choices, strict=True):
            nothing = "no alpha lowers the output error" if self.alpha == "auto" else None
            if pair.kind == "inserted" and isinstance(choice, Choice) and choice.relative_loss > _WORTH_A_MUL:  # Case 3
                choice = f"a Mul would take away {1 - choice.relative_loss:.0%} of the squared error only"
            self.decisions.append(fold_choice(pair, choice, region, nothing=nothing))

    def _search(self, judge: Judge) -> Choice | str | None:
        weight, most = judge.weight, known_channels(judge.statistics)
        tried = _ALPHAS if self.activations is None else _INT8_ALPHAS
        alphas = tried if self.alpha == "auto" else (self.alpha,)
        few = self.activations is not None and self.alpha == "auto" and most < len(weight)  # Case 4
        if few and not most:
            rows = judge.statistics.rows
            return f"seen on {rows} rows, too few to know how far any channel goes (at least {FEWEST_KNOWN} rows)"

        counts = standing_out(judge.shared.pool_max(judge.fitted.reach), most) if few else []
        if few and not counts:
            return (
                f"seen on {judge.statistics.rows} rows, and no channels stand out by {_SLACK:g} times from all others"
            )

        def candidates(statistics: Statistics) -> dict[str, Array]:
            activation = judge.shared.pool_max(statistics.reach)
            if few:
                return {f"the loudest {n} of {len(weight)} channels": levelled(activation, n) for n in counts}
            return {f"alpha={alpha:g}": smoothing_factor(activation, weight, float(alpha)) for alpha in alphas}

        return judge.best(candidates, finalists=_FINALISTS)


def standing_out(activation: Array, most: int) -> list[int]:
    """The numbers n, at most so many, of which each of the n loudest channels is over `_SLACK` times the next one."""
    peaks = -np.sort(-activation)
    return [n for n in range(1, min(most, len(peaks) - 1) + 1) if 0 < np.float32(_SLACK) * peaks[n] < peaks[n - 1]]


def levelled(activation: Array, count: int) -> Array:
    """max|X| of the loudest channels over `_SLACK` times that of the loudest but so many, float32 (K,).

    1 for other channels, and for all where none stands out.
    """
    end = np.float32(_SLACK) * np.partition(activation, -count - 1)[-count - 1]
    factor = np.ones_like(activation)
    if end > 0 and activation.max() >= _STANDS_OUT * end:
        factor = np.maximum(activation / end, factor)
    return factor


def smoothing_factor(activation: Array, weight: Array, alpha: float) -> Array:
    """s = max|X|^alpha / max|W|^(1 - alpha), geometric mean 1, float32 (K,); 1 for channels that are always zero."""
    dead = (activation == 0) | (weight == 0)
    with np.errstate(divide="ignore"):
        factor = activation**alpha / weight ** (1 - alpha)
    return normalized(np.where(dead, 0, factor))
