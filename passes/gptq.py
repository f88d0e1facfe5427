"""Error-compensated rounding (GPTQ, Frantar et al. 2022) from the Gram matrix alone."""

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Codes, Grid, QParams, Quantized
from qcompile.passes.algebra import Compensation
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.formats.columns import coded
from qcompile.passes.held import NOT_CONFIRMED, row_weights, too_few
from qcompile.passes.linears import Linear, find_linears
from qcompile.passes.native import RUN, Loops, widened
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import (
    Rounding,
    Weight,
    by_input,
    fitted,
    merge_columns,
    relative_error,
    round_to_nearest,
    round_with_clip,
)
from qcompile.passes.row_steps import Descent, Nearest, descent
from qcompile.passes.state import set_weight, weight_state
from qcompile.passes.statistics import Statistics

# Rows whose changes reach all others in one product.
_BLOCK = 256
# For each direction that rows lie in, so many channels and rows make it one of few: of fewer channels, codes that keep
# one direction give others away.
_CHANNELS, _ROWS = 32, 8
# The damping of endless data, and what is added by K / rows.
_LEAST_DAMPING, _SHARE = 0.01, 0.5
# Dampings among which rows held aside choose, as multiples of `default_damping`, and columns that they judge by.
_DAMPINGS, _TRIED = (0.3, 1.0, 3.0), 256
# Errors of columns whose damping is all but so much of them come from a product: the difference has lost its digits.
_CANCELLED = 0.01
# Columns that tell the error of a weight.
_TOLD = 512
# Why codes of a linear would not be stored; empty where they would.
Refused = Callable[[Linear], str]


@dataclass(frozen=True)
class ErrorCompensated:
    """Rounds a weight row by row, in order of falling activation energy, and spreads each error over the rows to come.

    Groups are static: their ranges are chosen before any row is rounded, so codes stay in natural order and nothing
    is permuted at run time. Afterwards `sweeps` rounds of coordinate descent revisit every scale and every code with
    all others fixed, each set to its best value: the damped output error of no column rises. A column for which plain
    rounding was better starts there.

    damping: added to the Gram matrix's diagonal, as a fraction of it; None chooses it by `default_damping`.
    """

    damping: float | None = None
    sweeps: int = 3
    refit: bool = True

    def __call__(self, w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
        """Codes of w (K, N) that keep X·w, by the statistics of X."""
        if statistics is None:
            raise TypeError("error-compensated rounding needs statistics")
        w = np.ascontiguousarray(w, dtype=np.float32)
        by = self._known(statistics, spec)
        best, _ = _started(w, by, spec.fit(w, by.diagonal), spec)
        if not self.sweeps and not self.refit:
            return best
        descending = _Descending(*by.damped, w, best)
        for number in range(max(self.sweeps, 1)):
            descending.round(forward=number % 2 == 0, codes=self.sweeps > 0, scales=self.refit)
        return descending.moving.result()

    def told(self, w: Array, spec: Grid, statistics: Statistics) -> tuple[Array, Array]:
        """Ŵ (K, N), and ‖X (Ŵ - W)‖² of each column: what the sweep is left with, less the damping. Where hardly
        anything is left then, or coordinate descent went on, a product tells.
        """
        if self.sweeps or self.refit:
            values = self(w, spec, statistics).dequantize()
            return values, statistics.squares(values - w)
        by = self._known(statistics, spec)
        made, damped = _started(w, by, spec.fit(w, by.diagonal), spec)
        values = made.dequantize()
        delta = values - w
        if not statistics.damps_channels:
            return values, statistics.squares(delta)
        errors = damped - by.damping(delta)
        cancelled = np.flatnonzero(errors < _CANCELLED * damped)
        if len(cancelled):
            errors[cancelled] = statistics.squares(delta)[cancelled]
        return values, errors

    def prepare(self, statistics: Statistics, spec: Grid) -> None:
        """Factor the Gram matrix where it is kept, before several threads round by it."""
        self._known(statistics, spec)

    def _known(self, statistics: Statistics, spec: Grid) -> Compensation:
        own = default_damping(len(statistics.absmax), statistics.rows) if self.damping is None else self.damping
        return statistics.compensation(own, spec.rows_per_code)


def default_damping(k: int, rows: int) -> float:
    """Damping for K channels seen on so many rows: the fewer rows, the less the Gram matrix says about others.

    Measured in docs/architecture.md: 0.01 after 2048 rows at K = 1536 is worse than rounding with clip.
    """
    return _LEAST_DAMPING + _SHARE * k / max(rows, 1)


def damped_by_rows(
    rounding: ErrorCompensated, wanted: "Beside", spec: Grid, statistics: Statistics
) -> ErrorCompensated:
    """The rounding with the damping of `_DAMPINGS` whose codes have the least error on rows held aside, fitted to the
    others; as it is where too few rows are known. Some of the columns tell, without the slow refinements; rows of
    extreme norm count as others do.
    """
    parts = statistics.split()
    if parts is None or too_few(statistics):
        return rounding
    rest, held = replace(parts[0], kept=None), parts[1]
    step, count = max(1, wanted.shape[1] // _TRIED), row_weights(held, statistics)
    w = np.concatenate([own[:, ::step] for own in wanted.weights], axis=1, dtype=np.float32)

    def loss(factor: float) -> float:
        tried = replace(rounding, damping=factor * default_damping(len(w), rest.rows), sweeps=0, refit=False)
        errors = held @ (tried(w, spec, rest).dequantize() - w)
        return float(count @ np.square(errors).sum(axis=1))

    losses = [loss(factor) for factor in _DAMPINGS]
    best = _DAMPINGS[int(np.argmin(losses))]
    return replace(rounding, damping=best * default_damping(len(w), statistics.rows))


def round_by_rows(w: Weight, spec: Grid, statistics: Statistics | None) -> Quantized:
    """How `pack` rounds what `gptq` has not: the parameters of groups by the rows, codes to the nearest.

    Case 1: the rows lie in few directions and show each often: a constant input, copies of one row. The clip search
            takes channels as unrelated, and errors of channels that go together add up instead of cancelling: the whole
            Gram matrix must tell, and so it does in error-compensated rounding, which leaves other directions their
            precision by its damping. Kept where rows held aside confirm it.
    Case 2: all others: `round_with_clip`.
    """
    if statistics is None or not _few_directions(statistics):
        return round_with_clip(w, spec, statistics)
    others = (round_to_nearest, round_with_clip)
    return fitted(w, spec, statistics, ErrorCompensated(), others) or round_with_clip(w, spec, statistics)


def _few_directions(statistics: Statistics) -> bool:
    most = min(len(statistics.gram) // _CHANNELS, statistics.rows // _ROWS)
    return statistics.sample is not None and 1 <= statistics.directions(most) <= most


_MOST_DAMPING, _MOST_SWEEPS = 1000, 1000


class Gptq(Pass):
    """Choose codes by error-compensated rounding on the Gram matrix (act-order, static groups, refit scales).

    Where the pass behind would not store them (`refuses_codes`), none are chosen.
    damping: auto, by channels and rows (`default_damping`); held, a third, once or three times that, as rows held aside
    say; or a number.
    """

    name: ClassVar[str] = "gptq"
    reads: Set[Reads] = frozenset({Reads.STATISTICS})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.CODES})

    def __init__(
        self,
        policy: Policy,
        refused: Refused | None = None,
        *,
        damping: float | Literal["auto", "held"] = "auto",
        sweeps: int = 3,
        refit: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(damping, str) and not 0 <= damping <= _MOST_DAMPING:
            known = f"'auto', 'held' or a number from 0 to {_MOST_DAMPING}"
            raise UserError(f"gptq: damping must be {known}, got {damping}")
        if not 0 <= sweeps <= _MOST_SWEEPS:
            raise UserError(f"gptq: sweeps must be 0 to {_MOST_SWEEPS}, got {sweeps}")
        self.policy, self.refused = policy, refused or (lambda linear: "")
        self.rounding = ErrorCompensated(None if isinstance(damping, str) else damping, sweeps, refit)
        self.by_rows = damping == "held"

    @property
    def rounds_by(self) -> Rounding:
        """The same without its slow refinements."""
        return ErrorCompensated(self.rounding.damping, sweeps=0, refit=False)

    def call(self, region: Region) -> None:
        """Leave the codes of every linear with statistics in its weight's state, for the pass that stores them."""
        vocabulary = region.vocabulary
        inputs: dict[ir.Value, dict[Grid, list[Linear]]] = {}
        begun: set[tuple[ir.Value, bool]] = set()
        for linear in find_linears(region.live_nodes()):
            spec = self.policy.for_linear(linear, vocabulary)
            if isinstance(spec, str):
                self.decide(linear.name, "skipped", spec)
                continue
            known = weight_state(linear.weight)
            if linear.transposed in known.codes:
                self.decide(linear.name, "skipped", "its weight is rounded already, for a node of an earlier segment")
                continue
            if reason := self.refused(linear):
                self.decide(linear.name, "skipped", reason)
                continue
            if (linear.weight, linear.transposed) in begun:
                self.decide(linear.name, "skipped", "its weight is rounded for another node that reads it")
                continue
            if (spec, linear.transposed) in known.packed:
                self.decide(linear.name, "skipped", "its weight is packed already, for a node of an earlier segment")
                continue
            if linear.activation not in region.statistics:
                self.decide(linear.name, "skipped", "its input was not observed")
                continue
            begun.add((linear.weight, linear.transposed))
            inputs.setdefault(linear.activation, {}).setdefault(spec, []).append(linear)
        rounded = by_input(
            self._rounded,
            list(inputs.items()),
            load=lambda own: (region.statistics[own[0]], own[1]),
            channels=lambda own: next(iter(own[1].values()))[0].shape[0],
        )
        groups = [linears for own in inputs.values() for linears in own.values()]
        for linears, found in zip(groups, itertools.chain.from_iterable(rounded), strict=True):
            for number, linear in enumerate(linears):
                if isinstance(found, str):
                    self.decide(linear.name, "skipped", found)
                    continue
                codes, error = found[number]
                self.decide(linear.name, "rounded", "error-compensated", relative_error=error)
                own = weight_state(linear.weight).codes
                set_weight(linear.weight, codes={**own, linear.transposed: codes})

    def _rounded(
        self, statistics: Statistics, linears: Mapping[Grid, list[Linear]]
    ) -> list[list[tuple[Quantized, float]] | str]:
        """What `round_together` makes of the linears of an input, one grid after the other: all are fitted to the parts
        of the statistics that passes before have left, which then go.
        """
        known = self.rounding, self.by_rows
        found = [round_together(*known, Beside.of(own), spec, statistics) for spec, own in linears.items()]
        statistics.forget()  # large, and of no more use
        return found


def round_together(
    rounding: ErrorCompensated, by_rows: bool, wanted: "Beside", spec: Grid, statistics: Statistics
) -> list[tuple[Quantized, float]] | str:
    """The codes of each of several weights that share an input, and their relative errors; or why there are none.

    by_rows: rows held aside choose the damping.
    """
    if by_rows:
        rounding = damped_by_rows(rounding, wanted, spec, statistics)
    others: list[Rounding] = [round_to_nearest]
    if not spec.fine:  # else `pack` and `qdq` do not clip
        others.append(round_with_clip)
    joint = fitted(wanted, spec, statistics, rounding, others)
    if joint is None:
        return too_few(statistics) or NOT_CONFIRMED
    start, found = 0, list[tuple[Quantized, float]]()
    for w in wanted.weights:
        part = joint.columns(slice(start, start + w.shape[1]))
        part = replace(part, codes=np.ascontiguousarray(part.codes))
        found.append((part, _error(part, w, statistics)))
        start += w.shape[1]
    return found


@dataclass(frozen=True, eq=False)
class Beside:
    """Weights of as many rows, read as one: a part becomes float32 when it is read."""

    weights: Sequence[npt.NDArray[np.floating]]

    @classmethod
    def of(cls, linears: Sequence[Linear]) -> "Beside":
        """Those of linears, as codes are chosen for them."""
        return cls([coded(own) for own in linears])

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return len(self.weights[0]), sum(w.shape[1] for w in self.weights)

    def __getitem__(self, place: tuple[slice, slice]) -> Array:
        rows, columns = place
        parts, before = list[Array](), 0
        for w in self.weights:
            own = slice(max(columns.start - before, 0), max(columns.stop - before, 0))
            parts.append(widened(w[rows, own]))
            before += w.shape[1]
        return np.concatenate(parts, axis=1)


def _error(q: Quantized, w: npt.NDArray[np.floating], statistics: Statistics) -> float:
    """‖X (Ŵ - W)‖ / ‖X W‖, by columns evenly spread."""
    step = max(1, w.shape[1] // _TOLD)
    wanted = np.asarray(w[:, ::step], np.float32)
    return relative_error(q.columns(slice(None, None, step)).dequantize() - wanted, wanted, statistics.gram)


def _started(w: Array, by: Compensation, qparams: QParams, spec: Grid) -> tuple[Quantized, Array]:
    """Codes of w (K, N) after the sweep, or of a column those of plain rounding where their error is less; and the
    damped error of each column (N,).

    That is looked at where the sweep leaves more than plain rounding would by the diagonal alone: where it ran
    into the ends of the grid, as a rule nowhere.
    """
    swept, spread = _compensate(w, by, qparams, spec)
    plain = Quantized(spec.project(w, qparams), qparams, spec)
    alone, errors = w - plain.dequantize(), np.einsum("kn,kn->n", spread, spread)
    np.square(alone, out=alone)
    alone *= by.diagonal
    doubtful = np.flatnonzero(errors > alone.sum(axis=0))
    if not len(doubtful):
        return swept, errors
    others, delta = np.full_like(errors, np.inf), w[:, doubtful] - plain.columns(doubtful).dequantize()
    others[doubtful] = np.square(by.of_columns(doubtful).transposed_times(delta[by.order])).sum(axis=0)
    return merge_columns(swept, plain, others < errors), np.minimum(errors, others)


def _compensate(w: Array, by: Compensation, qparams: QParams, spec: Grid) -> tuple[Quantized, Array]:
    """The GPTQ sweep over w (K, N), and what is left of each row's error, (K, N) in `by.order`: e = (s L)ᵀ (W - Ŵ).

    Rows are rounded from the last to the first. The damped error of a column is the sum of its squares of e, and a row
    of e depends on the rows behind it alone: each code is the one that makes its own e least, the rest being as it is
    (Babai's nearest plane; the same codes as by the inverse's factor: Chen et al. 2025, "The Geometry of LLM
    Quantization"). No inverse is needed.
    """
    sweep = _Sweep(w, by, Nearest(qparams, spec, len(w)), np.empty(w.shape, spec.code_dtype))
    sweep.several(0, len(w))
    return Quantized(sweep.codes, qparams, spec), sweep.spread


class _Sweep:
    """The rows of a sweep over w (K, N) that are rounded, in the order of `by`: codes, what is left of each row's value
    times s, and e.
    """

    def __init__(self, w: Array, by: Compensation, round_row: Nearest, codes: Codes) -> None:
        self.w, self.by, self.round_row, self.codes = w, by, round_row, codes
        self.together, self.loops = round_row.spec.rows_per_code, Loops.of(round_row.spec)
        self.left, self.spread = np.empty_like(w), np.zeros_like(w)

    def one(self, i: int, stop: int) -> None:
        """Round a row behind those that `spread` does not know, which end before `stop`."""
        row, scale, lower = self.by.order[i], self.by.scale[i], self.by.lower
        unit, own = lower[i, i] * scale, self.w[row]
        carried = self.spread[i] + lower[i + 1 : stop, i] @ self.left[i + 1 : stop]
        wish = own + carried / unit
        self.codes[row], decoded = self.round_row(row, wish)
        self.left[i], self.spread[i] = scale * (own - decoded), unit * (wish - decoded)

    def together_from(self, i: int, stop: int) -> None:
        """The same of the rows that share a code, of which i is the first (block LDLQ: Tseng et al. 2024, "QuIP#").

        Of these e is (s C)ᵀ (w - ŵ) + what is carried, C their corner of L, so that the code of least e is the nearest
        one to a wish in the metric s C Cᵀ s.
        """
        end = min(i + self.together, len(self.w))
        rows, scale, corner = self.by.order[i:end], self.by.scale[i:end], np.tril(self.by.lower[i:end, i:end])
        own = self.w[rows]
        carried = self.spread[i:end] + self.by.lower[end:stop, i:end].T @ self.left[end:stop]
        wish = own + np.linalg.solve(corner.T, carried) / scale
        metric = (corner @ corner.T)[:, :, None] * scale[:, None] * scale[None]
        self.codes[rows], decoded = self.round_row.several(int(rows[0]), wish, metric)
        self.left[i:end], self.spread[i:end] = scale * (own - decoded), corner.T @ (scale * (wish - decoded))

    def several(self, start: int, stop: int) -> None:
        """Round rows, the last first: by halves, so that most of what they carry are products of matrices."""
        if self.loops is not None and stop - start <= RUN:
            own = self.w, self.round_row.qparams, self.round_row.size, self.codes, self.left, self.spread
            self.loops.sweep(self.by, slice(start, stop), *own)
            return
        if stop - start <= RUN:
            step = self.one if self.together == 1 else self.together_from
            for i in reversed(range(start, stop, self.together)):
                step(i, stop)
            return
        middle = start + (stop - start) // 2 // self.together * self.together
        self.several(middle, stop)
        self.spread[start:middle] += self.by.lower[middle:stop, start:middle].T @ self.left[middle:stop]
        self.several(start, middle)


class _Descending:
    """Rounds of coordinate descent: every scale and every code is set to its best value with all others fixed.

    gram: G without what is `added` to its diagonal (K,). left: W - Ŵ, (K, N). outside: of each block of rows
    G (W - Ŵ) as far as the rows count that the next round meets behind the block. Rounds go to and fro, so these are
    the rows that the last round met before it, and their share is known from there: a round takes K² N operations,
    half of a product by G (Niethammer 1964, of symmetric relaxation).
    """

    def __init__(self, gram: Array, added: Array, w: Array, start: Quantized) -> None:
        self.gram, self.added, self.moving = gram, added, descent(start)
        k, size = len(w), self.moving.size
        width = max(size, _BLOCK // size * size)
        self.blocks = [slice(top, min(top + width, k)) for top in range(0, k, width)]
        self.left, self.outside = w - start.dequantize(), np.empty_like(w)
        for rows in self.blocks:
            self.outside[rows] = gram[rows, rows.stop :] @ self.left[rows.stop :]

    def round(self, *, forward: bool, codes: bool, scales: bool) -> None:
        """Rows from the first to the last, or from the last to the first; the two take turns, forward first."""
        for rows in self.blocks if forward else reversed(self.blocks):
            met = slice(0, rows.start) if forward else slice(rows.stop, None)
            own = _Block(self.gram[rows, rows], self.added[rows], self.moving, rows.start)
            before = self.gram[rows, met] @ self.left[met]
            pull = self.outside[rows] + before + own.times(self.left[rows])
            self.outside[rows] = before
            self.left[rows] -= own.descend(pull, codes=codes, scales=scales)


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows of whole groups, from `top` on: their part of G (M, M) without what is `added` to its diagonal (M,).

    pull: these rows of G (W - Ŵ), (M, N), which follows every change in place.
    """

    gram: Array
    added: Array
    moving: Descent
    top: int

    def times(self, x: Array) -> Array:
        """G x of x (M, N)."""
        return np.asarray(self.gram @ x + self.added[:, None] * x)

    def descend(self, pull: Array, *, codes: bool, scales: bool) -> Array:
        """Set scales and codes to their best values; returns the change of all values (M, N)."""
        size, change = self.moving.size, np.zeros_like(pull)
        for start in range(0, len(pull), size):
            rows = slice(start, min(start + size, len(pull)))
            if codes:
                self._recode(pull, change, rows)
            if scales:
                self._rescale(pull, change, rows)
        return change

    def _rescale(self, pull: Array, change: Array, rows: slice) -> None:
        """Set the scales (N,) of a group to those of least error, where the file can hold better ones."""
        own = slice(self.top + rows.start, self.top + rows.stop)
        levels = self.moving.levels(own)
        product = self.gram[:, rows] @ levels
        product[rows] += self.added[rows, None] * levels
        self.moving.rescale(own, rows.start, product, pull, change[rows])

    def _recode(self, pull: Array, change: Array, rows: slice) -> None:
        """Set each code of a group to its best."""
        for start in range(rows.start, rows.stop, RUN):
            run = slice(start, min(start + RUN, rows.stop))
            own = slice(self.top + run.start, self.top + run.stop)
            moved = self.moving.run(own, pull[run], self.gram[run, run], self.added[run])
            pull -= self.gram[:, run] @ moved
            pull[run] -= self.added[run, None] * moved
            change[run] += moved
