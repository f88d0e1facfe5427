"""Rounding a weight one row at a time, on any grid: what GPTQ's sweep and coordinate descent do with a row.

`Nearest` and `Descent` ask the grid itself, `AffineNearest` and `AffineDescent` compute the same on integers, in a
fraction of the time (tests/passes/test_gptq.py compares them).
"""

import numpy as np

from qcompile.passes.affine import Array, Codes, Grid, IntegerRange, QParams, Quantized, expand


class Nearest:
    """Rounds rows (N,) of a weight (K, N), each on the parameters of its group."""

    def __init__(self, qparams: QParams, spec: Grid, k: int) -> None:
        self.qparams, self.spec, self.size = qparams, spec, spec.group_size(k)

    def __call__(self, row: int, values: Array) -> tuple[Array | Codes, Array]:
        """(the nearest codes of the values (N,) of a row, what they stand for)."""
        group = slice(row // self.size, row // self.size + 1)
        own = QParams(self.qparams.scale[group], self.qparams.zero_point[group])
        codes = self.spec.project(values[None], own)
        return codes[0], self.spec.decode(codes, own)[0]


class AffineNearest(Nearest):
    """The same where codes are integers."""

    def __init__(self, qparams: QParams, spec: Grid, k: int, ends: IntegerRange) -> None:
        super().__init__(qparams, spec, k)
        self.low, self.high = ends.qmin, ends.qmax
        self.scale, self.zero = (expand(own, spec, k) for own in (qparams.scale, qparams.zero_point))

    def __call__(self, row: int, values: Array) -> tuple[Array | Codes, Array]:
        scale, zero = self.scale[row], self.zero[row]
        codes = np.clip(np.rint(values / scale) + zero, self.low, self.high)
        return codes, (codes - zero) * scale


class Descent:
    """Moves one row after another of a quantized weight (K, N) to the codes of least error, all others fixed."""

    def __init__(self, q: Quantized) -> None:
        self.q, self.codes, self.values = q, q.codes.copy(), q.dequantize()
        self._nearest = Nearest(q.qparams, q.spec, len(q.codes))

    def start(self) -> Array:
        """What the codes (K, N) stand for before any row is moved."""
        return self.values

    def move(self, row: int, pull: Array, energy: np.float32) -> Array:
        """Change the codes of a row; returns by how much (N,) its values change.

        pull (N,): the row of XᵀX (W - Ŵ). energy: the row's diagonal element of XᵀX.
        """
        codes, values = self._nearest(row, self.values[row] + pull / energy)
        change: Array = values - self.values[row]
        self.codes[row], self.values[row] = codes, values
        return change

    def result(self) -> Quantized:
        """The weight with its codes as they are now."""
        return Quantized(self.codes, self.q.qparams, self.q.spec)


class AffineDescent(Descent):
    """The same where codes are integers."""

    def __init__(self, q: Quantized, ends: IntegerRange) -> None:
        self.q, k = q, len(q.codes)
        self.scale, self.zero = (expand(own, q.spec, k) for own in (q.qparams.scale, q.qparams.zero_point))
        self.levels, self.low, self.high = q.codes.astype(np.float32) - self.zero, ends.qmin, ends.qmax

    def start(self) -> Array:
        return self.levels * self.scale

    def move(self, row: int, pull: Array, energy: np.float32) -> Array:
        scale, zero = self.scale[row], self.zero[row]
        wish = self.levels[row] + pull / (energy * scale)
        better = np.clip(np.rint(wish), self.low - zero, self.high - zero)
        change: Array = (better - self.levels[row]) * scale
        self.levels[row] = better
        return change

    def result(self) -> Quantized:
        return Quantized((self.levels + self.zero).astype(self.q.codes.dtype), self.q.qparams, self.q.spec)


def nearest(qparams: QParams, spec: Grid, k: int) -> Nearest:
    """What rounds rows of a (k, N) weight: the fast form where the grid has one."""
    return Nearest(qparams, spec, k) if spec.affine is None else AffineNearest(qparams, spec, k, spec.affine)


def descent(q: Quantized) -> Descent:
    """What moves rows of a quantized weight: the fast form where the grid has one."""
    return Descent(q) if q.spec.affine is None else AffineDescent(q, q.spec.affine)
