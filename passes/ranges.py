"""Scales and zero points of groups by the weight alone, where nothing is known of its input.

The grid of a group is chosen among a few by Σ |w| (ŵ - w)²: a squared error that counts as much as the weight is large.
Plain squared errors, which are least where the largest weights are cut off, mislead: by them SmolLM2 at 3 bits becomes
worse than by rounding to nearest (docs/architecture.md).

Invariant: by that error no group is worse than rounded to nearest on its whole range, whatever it is chosen among. Of
grids whose codes stand for several rows it would not hold: their nearest codes are of least plain
error, and with another scale others, which can be worse by |w|. These have their own fit, always.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qcompile.passes.affine import Array, Grid, QParams, Quantized, grouped
from qcompile.passes.rounding import Weight, by_blocks, round_to_nearest
from qcompile.passes.statistics import Statistics

# What a recipe can choose.
Ranges = Literal["auto", "nearest", "search", "hqq", "best"]
# Grids to choose among for blocks (groups, rows, N), beside that of their whole range.
Proposals = Callable[[Array, QParams, Grid], Iterator[QParams]]
# Bits up to which the search is what a weight gets of itself: the KL of a whole model tells of a gain (-16 % at 3 bits,
# nothing at 4: docs/architecture.md), and the search is cheap where codes are integers.
_COARSE = 3
# Fractions of the range that are tried, at most: all 18 leave 0.3 % less error.
_FRACTIONS = 5
# Half-quadratic optimization: the norm; how steep the penalty is, and grows by the round; rounds.
_NORM, _PENALTY, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 10


@dataclass(frozen=True)
class ByWeight:
    """The rounding of a weight by itself.

    nearest: on the whole range of each group. search: on the best of a few fractions of it (`fractions`). hqq: on what
    half-quadratic optimization finds (`half_quadratic`). best: on the better of both. auto: search for integers of
    `_COARSE` bits and fewer, else nearest. Fine grids gain nothing, and are rounded to nearest; so are those of codes
    for several rows, whose own fit is a search already (`CodebookGrid.fit`).
    """

    ranges: Ranges

    def __call__(self, w: Weight, spec: Grid, statistics: Statistics | None) -> Quantized:
        """The codes of w (K, N); no statistics are used."""
        own = self.ranges
        if own == "auto":
            own = "nearest" if spec.affine is None or spec.bits > _COARSE else "search"
        if own == "nearest" or spec.fine or spec.rows_per_code > 1:
            return round_to_nearest(w, spec, None)
        return by_blocks(lambda block: chosen(block, spec, _PROPOSALS[own]), w, spec)


def chosen(w: Array, spec: Grid, proposals: Proposals) -> QParams:
    """The best grid of every group of w (K, N) among what is proposed and its whole range."""
    blocks, size = grouped(w, spec), grouped(np.abs(w), spec, fill=0.0)
    whole = spec.span(blocks, np.float32(1))
    choice = _Choice(blocks, size, whole, spec)
    for proposed in proposals(blocks, whole, spec):
        choice.consider(proposed)
    choice.consider(choice.best)  # its codes are others now
    return choice.best


class _Choice:
    """The best of the grids considered so far, at first that of the whole range; error (groups, N): what it leaves,
    but for what all of them leave.
    """

    def __init__(self, blocks: Array, size: Array, whole: QParams, spec: Grid) -> None:
        self.blocks, self.size, self.spec, self.sized = blocks, size, spec, size * blocks
        gain, power = self._products(whole)
        self.best, self.error = whole, whole.scale * (whole.scale * power - 2 * gain)
        self._refit(whole, gain, power)

    def consider(self, proposed: QParams) -> None:
        """The codes of a grid, with the scale that makes their error least."""
        self._refit(proposed, *self._products(proposed))

    def _products(self, proposed: QParams) -> tuple[Array, Array]:
        levels = self.spec.levels(self.spec.nearest(self.blocks, proposed), proposed.zero_point[:, None])
        gain = np.einsum("gkn,gkn->gn", levels, self.sized)
        return gain, np.einsum("gkn,gkn,gkn->gn", levels, levels, self.size)

    def _refit(self, proposed: QParams, gain: Array, power: Array) -> None:
        usable = (power > 0) & ((gain > 0) == (proposed.scale > 0))
        scale = self.spec.storable(np.divide(gain, power, out=proposed.scale.copy(), where=usable))
        error = scale * (scale * power - 2 * gain)
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.best = QParams(
            np.where(better, scale, self.best.scale), np.where(better, proposed.zero_point, self.best.zero_point)
        )


def fractions(blocks: Array, whole: QParams, spec: Grid) -> Iterator[QParams]:
    """Some of the fractions of the range that a clip search tries; zero points stay."""
    step = -(-len(spec.shrinks) // _FRACTIONS)
    for shrink in spec.shrinks[step::step]:
        yield QParams(whole.scale * np.float32(shrink), whole.zero_point)


def half_quadratic(blocks: Array, whole: QParams, spec: Grid) -> Iterator[QParams]:
    """Zero points and scales of least Σ |ŵ - w|^p, p < 1, which a few large errors hardly move (HQQ, Badri & Shaji
    2023), in steps of the grid.

    The errors are split into those that the norm would keep (a generalized soft threshold) and the rest, to which zero
    point and scale are fitted by turns in closed form. A zero point that has to be a code is the nearest one in the
    end. Of grids without (symmetric ones, tables) the scale alone is fitted.
    """
    scale, zero, penalty, ends = whole.scale, whole.zero_point, _PENALTY, spec.affine
    for _ in range(_ROUNDS):
        steps = blocks / scale[:, None]
        if ends is None:
            levels = spec.levels(spec.nearest(blocks, QParams(scale, zero)), zero[:, None])
        else:
            levels = np.clip(np.rint(steps + zero[:, None]), ends.qmin, ends.qmax) - zero[:, None]
        wanted = steps - _thresholded(steps - levels, penalty)
        if ends is not None and ends.qmin == 0:
            change = (levels - wanted).mean(axis=1)
            zero, levels = zero + change, levels - change[:, None]
        gain, power = (np.einsum("gkn,gkn->gn", levels, by) for by in (wanted, levels))
        factor = np.divide(gain, power, out=np.ones_like(gain), where=power > 0)
        scale = scale * np.where(factor > 0, factor, np.float32(1))
        penalty *= _GROWTH
    if ends is not None:
        zero = np.clip(np.rint(zero), ends.qmin, ends.qmax)
    yield QParams(spec.storable(scale), zero)


def _thresholded(errors: Array, penalty: float) -> Array:
    """What the norm keeps of errors: sign(e) · max(|e| - |e|^(p - 1) / penalty, 0)."""
    magnitude = np.maximum(np.abs(errors), np.finfo(np.float32).tiny)
    kept = np.maximum(magnitude - magnitude ** np.float32(_NORM - 1) / np.float32(penalty), 0)
    return np.asarray(np.copysign(kept, errors))


def _both(blocks: Array, whole: QParams, spec: Grid) -> Iterator[QParams]:
    yield from fractions(blocks, whole, spec)
    yield from half_quadratic(blocks, whole, spec)


_PROPOSALS: Mapping[str, Proposals] = {"search": fractions, "hqq": half_quadratic, "best": _both}
