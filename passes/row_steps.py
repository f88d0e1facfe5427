"""Rounding a weight one row at a time, on any grid: what GPTQ's sweep and coordinate descent do with rows.

`Nearest` and `Descent` ask the grid itself; `NativeDescent` computes the same on levels, in a fraction of the time
(tests/passes/test_native.py compares them).
"""

import numpy as np

from qcompile.passes.affine import Array, Codes, Grid, QParams, Quantized
from qcompile.passes.native import Loops


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

    def run(self, rows: slice, pull: Array, gram: Array, added: Array) -> Array:
        """Change the codes of rows of one group, one after another; returns by how much their values change (s, N).

        pull (s, N): their rows of G (W - Ŵ). gram (s, s): their part of G, without what is `added` to its diagonal.
        """
        own, together = np.zeros_like(pull), self.q.spec.rows_per_code
        for i in range(0, len(pull), together):
            end = min(i + together, len(pull))
            wanted = pull[i:end] - gram[i:end, :i] @ own[:i]
            if together == 1:
                own[i] = self._move(rows.start + i, wanted[0], gram[i, i] + added[i])
            else:
                corner = gram[i:end, i:end] + np.diag(added[i:end])
                own[i:end] = self._move_several(rows.start + i, wanted, corner)
        return own

    def rescale(self, rows: slice, first: int, product: Array, pull: Array, change: Array) -> None:
        """Set the scale of a group to that of least error, where the file can hold a better one.

        product: G by the group's levels, pull: G (W - Ŵ), of the rows of a block (M, N), in which the group's begin
        with the `first`. pull follows in place; the change of the group's values (s, N) is added to `change`.
        """
        spec, levels, scale = self.q.spec, self.levels(rows), self.scale[rows.start // self.size]
        own = slice(first, first + len(levels))
        power, gain = (np.einsum("kn,kn->n", levels, by[own]) for by in (product, pull))
        wish = scale + np.divide(gain, power, out=np.zeros_like(gain), where=power > 0)
        usable = np.isfinite(wish) & ((wish > 0) if spec.positive else (wish != 0))
        step = spec.storable(np.where(usable, wish, scale)) - scale
        step = np.where(step * (step * power - 2 * gain) < 0, step, np.float32(0))
        scale += step
        pull -= step * product
        change += step * levels

    def _move(self, row: int, pull: Array, energy: np.float32) -> Array:
        """Change the codes of a row; returns by how much (N,) its values change.

        pull (N,): the row of G (W - Ŵ). energy: the row's diagonal element of G.
        """
        group, spec = row // self.size, self.q.spec
        own = self._own(group, self.scale[group : group + 1])
        before = spec.decode(self.codes[row : row + 1], own)
        codes = spec.project(before + pull / energy, own)
        self.codes[row] = codes[0]
        change: Array = (spec.decode(codes, own) - before)[0]
        return change

    def _move_several(self, row: int, pull: Array, gram: Array) -> Array:
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


class NativeDescent(Descent):
    """The same by the loops of `native`: levels are kept instead of codes."""

    def __init__(self, q: Quantized, loops: Loops) -> None:
        self.q, self.size, self.loops = q, q.spec.group_size(len(q.codes)), loops
        self.scale, self.zero = q.qparams.scale.copy(), q.qparams.zero_point
        self._levels = q.spec.decode(q.codes, self._unscaled)

    @property
    def _unscaled(self) -> QParams:
        return QParams(np.ones_like(self.scale), self.zero)

    def levels(self, rows: slice) -> Array:
        return self._levels[rows]

    def run(self, rows: slice, pull: Array, gram: Array, added: Array) -> Array:
        group = rows.start // self.size
        return self.loops.recode(gram, added, pull, self.scale[group], self.zero[group], self._levels[rows])

    def rescale(self, rows: slice, first: int, product: Array, pull: Array, change: Array) -> None:
        own = self.scale[rows.start // self.size]
        self.loops.rescale(first, self._levels[rows], product, pull, own, change)

    def result(self) -> Quantized:
        codes = self.q.spec.project(self._levels, self._unscaled)
        return Quantized(codes, QParams(self.scale, self.zero), self.q.spec)


def descent(q: Quantized) -> Descent:
    """What moves rows of a quantized weight: the fast form where the grid has one."""
    loops = Loops.of(q.spec)
    return Descent(q) if loops is None else NativeDescent(q, loops)
