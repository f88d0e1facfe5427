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

    def several(self, row: int, values: Array, metric: Array) -> tuple[Codes, Array]:
        """The same of rows (s, N) that share a code, from `row` on, by a metric (s, s, 1 or N)."""
        group = slice(row // self.size, row // self.size + 1)
        own = QParams(self.qparams.scale[group], self.qparams.zero_point[group])
        codes = self.spec.project_by(values, own, metric)
        return codes, self.spec.decode(codes, own)


class AffineNearest(Nearest):
    """The same where codes are integers."""

    def __init__(self, qparams: QParams, spec: Grid, k: int, ends: IntegerRange) -> None:
        super().__init__(qparams, spec, k)
        self.low, self.high = ends.qmin, ends.qmax

    def __call__(self, row: int, values: Array) -> tuple[Array | Codes, Array]:
        group = row // self.size
        scale, zero = self.qparams.scale[group], self.qparams.zero_point[group]
        codes = np.clip(np.rint(values / scale) + zero, self.low, self.high)
        return codes, (codes - zero) * scale


class Descent:
    """Moves rows and scales of a quantized weight (K, N) to the values of least error, all others fixed."""

    def __init__(self, q: Quantized) -> None:
        self.q, self.size = q, q.spec.group_size(len(q.codes))
        self.scale, self.zero = q.qparams.scale.copy(), q.qparams.zero_point
        self.codes = q.codes.copy()

    def levels(self, rows: slice) -> Array:
        """What the codes of rows of one group stand for at scale 1."""
        group = rows.start // self.size
        own = self._own(group, np.ones_like(self.scale[group : group + 1]))
        return self.q.spec.decode(self.codes[rows], own)

    def move(self, row: int, pull: Array, energy: np.float32) -> Array:
        """Change the codes of a row; returns by how much (N,) its values change.

        pull (N,): the row of XᵀX (W - Ŵ). energy: the row's diagonal element of XᵀX.
        """
        group, spec = row // self.size, self.q.spec
        own = self._own(group, self.scale[group : group + 1])
        before = spec.decode(self.codes[row : row + 1], own)
        codes = spec.project(before + pull / energy, own)
        self.codes[row] = codes[0]
        change: Array = (spec.decode(codes, own) - before)[0]
        return change

    def move_several(self, row: int, pull: Array, gram: Array) -> Array:
        """The same of rows that share a code, from `row` on; pull and the change (s, N), gram: their part (s, s)."""
        group, spec, rows = row // self.size, self.q.spec, slice(row, row + len(pull))
        own = self._own(group, self.scale[group : group + 1])
        before = spec.decode(self.codes[rows], own)
        codes = spec.project_by(before + np.linalg.solve(gram, pull), own, gram[:, :, None])
        self.codes[rows] = codes
        return np.asarray(spec.decode(codes, own) - before)

    def result(self) -> Quantized:
        """The weight with its codes and scales as they are now."""
        return Quantized(self.codes, QParams(self.scale, self.zero), self.q.spec)

    def _own(self, group: int, scale: Array) -> QParams:
        return QParams(scale, self.zero[group : group + 1])


class AffineDescent(Descent):
    """The same where codes are integers."""

    def __init__(self, q: Quantized, ends: IntegerRange) -> None:
        self.q, self.size = q, q.spec.group_size(len(q.codes))
        self.scale, self.zero = q.qparams.scale.copy(), q.qparams.zero_point
        self.low, self.high = ends.qmin - self.zero, ends.qmax - self.zero
        self._levels = q.codes - expand(self.zero, q.spec, len(q.codes))

    def levels(self, rows: slice) -> Array:
        return self._levels[rows]

    def move(self, row: int, pull: Array, energy: np.float32) -> Array:
        group, levels = row // self.size, self._levels[row]
        wish = np.rint(levels + pull / (energy * self.scale[group]))
        better = np.minimum(np.maximum(wish, self.low[group]), self.high[group])
        change: Array = (better - levels) * self.scale[group]
        self._levels[row] = better
        return change

    def result(self) -> Quantized:
        codes = self._levels + expand(self.zero, self.q.spec, len(self._levels))
        return Quantized(codes.astype(self.q.codes.dtype), QParams(self.scale, self.zero), self.q.spec)


def nearest(qparams: QParams, spec: Grid, k: int) -> Nearest:
    """What rounds rows of a (k, N) weight: the fast form where the grid has one."""
    return Nearest(qparams, spec, k) if spec.affine is None else AffineNearest(qparams, spec, k, spec.affine)


def descent(q: Quantized) -> Descent:
    """What moves rows of a quantized weight: the fast form where the grid has one."""
    return Descent(q) if q.spec.affine is None else AffineDescent(q, q.spec.affine)
