"""The range of least loss: both ends searched by magnitude, coarsely everywhere, then finely around the best."""

from collections.abc import Callable
from itertools import product

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.observers.distribution import Numbers
from qcompile.passes.spec import ActivationSpec

# Losses (candidates,) of ranges low, high, both float32 (candidates,).
Loss = Callable[[Array, Array], Numbers]

# Octaves below the extremes that are searched: an end 2^-12 of its extreme is zero to an 8-bit grid.
_OCTAVES = 12
_STEPS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
# Candidates whose losses are computed together, so that their arrays stay within the processor's caches.
_BLOCK = 16


def search(loss: Loss, low: float, high: float, spec: ActivationSpec) -> tuple[float, float]:
    """The range of least loss within low … high and zero.

    Candidates are the extremes times 2^-e: every pair of even e for the two ends, then ever smaller steps around the
    best so far; a symmetric grid has one e for both. Ties go to the wider range.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    axes = [[float(octave) for octave in range(0, _OCTAVES + 1, 2)] for _ in range(1 if spec.symmetric else 2)]
    if not spec.symmetric:
        axes = [axis if end else [0.0] for axis, end in zip(axes, (low, high), strict=True)]
    best, least = (0.0,) * len(axes), np.inf
    tried: set[tuple[float, ...]] = set()
    for step in (0.0, *_STEPS):
        near = axes if not step else [_around(own, step, axis) for own, axis in zip(best, axes, strict=True)]
        candidates = [exponents for exponents in product(*near) if exponents not in tried]
        tried.update(candidates)
        losses = _losses(loss, [_range(exponents, low, high) for exponents in candidates])
        for exponents, own in zip(candidates, losses, strict=True):
            if own < least:
                best, least = exponents, own
    return _range(best, low, high)


def _around(exponent: float, step: float, axis: list[float]) -> list[float]:
    """Neighbours that are not above the extreme; an end that is not searched stays."""
    if len(axis) == 1:
        return axis
    return [near for near in (exponent - step, exponent, exponent + step) if near >= 0]


def _range(exponents: tuple[float, ...], low: float, high: float) -> tuple[float, float]:
    if len(exponents) == 2:
        return low * 2.0 ** -exponents[0], high * 2.0 ** -exponents[1]
    most = max(-low, high) * 2.0 ** -exponents[0]
    return max(-most, low), min(most, high)


def _losses(loss: Loss, ranges: list[tuple[float, float]]) -> list[float]:
    pairs = np.array(ranges, np.float32).reshape(-1, 2)
    blocks = [pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK)]
    return [float(own) for block in blocks for own in loss(block[:, 0], block[:, 1])]
