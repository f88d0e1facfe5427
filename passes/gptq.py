"""Error-compensated rounding (GPTQ, Frantar et al. 2022) from the Gram matrix alone."""

import itertools
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, QParams, Quantized
from qcompile.passes.algebra import Compensation
from qcompile.passes.base import Decision, Pass, Region
from qcompile.passes.contract import Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.formats.columns import coded
from qcompile.passes.held import NOT_CONFIRMED, too_few
from qcompile.passes.linears import Linear, find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rounding import (
    Fit,
    Rounding,
    fitted,
    merge_columns,
    relative_error,
    round_to_nearest,
    round_with_clip,
)
from qcompile.passes.row_steps import Descent, Nearest, descent, nearest
from qcompile.passes.state import set_weight, weight_state
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import allowed

# Rows rounded one by one before the rest follows in one matrix product.
_BLOCK = 32
_THREADS = 2
# For each direction that rows lie in, so many channels and rows make it one of few: of fewer channels, codes that keep
# one direction give others away.
_CHANNELS, _ROWS = 32, 8
# The damping of endless data, and what is added by K / rows.
_LEAST_DAMPING, _SHARE = 0.01, 0.5
# A linear, the codes of its weight where they are kept, and what is told of it.
_Rounded = tuple[Linear, Quantized | None, Decision]
# Why codes of a linear would not be stored; empty where they would.
Refused = Callable[[Linear], str]
# What rounds rows of a (k, N) weight on its parameters.
Rows = Callable[[QParams, Grid, int], Nearest]


@dataclass(frozen=True)
class ErrorCompensated:
    """Rounds a weight row by row, in order of falling activation energy, and spreads each error over the rows to come.

    Groups are static: their ranges are chosen before any row is rounded, so codes stay in natural order and nothing
    is permuted at run time. Afterwards `sweeps` rounds of coordinate descent revisit every code with all others
    fixed, and the group scales are refit by least squares for the codes chosen; a column keeps a step only if its exact
    output error fell.

    damping: added to the Gram matrix's diagonal, as a fraction of it; None chooses it by `default_damping`.
    """

    damping: float | None = None
    sweeps: int = 2
    refit: bool = True

    def __call__(self, w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
        """Codes of w (K, N) that keep X·w, by the statistics of X."""
        if statistics is None:
            raise TypeError("error-compensated rounding needs statistics")
        w = np.ascontiguousarray(w, dtype=np.float32)
        damping = default_damping(len(w), statistics.rows) if self.damping is None else self.damping
        gram = statistics.damped(damping)
        qparams = spec.fit(w, np.diagonal(gram))
        best = _Candidate(w, statistics, gram, Quantized(spec.project(w, qparams), qparams, spec))
        best.improve(_compensate(w, statistics.compensation(damping), qparams, spec))
        for _ in range(self.sweeps):
            if self.refit:
                best.improve(_refit_scales(gram, best.quantized, best.pull))
            best.improve(*_descend(gram, best.quantized, best.pull))
        if self.refit:
            best.improve(_refit_scales(gram, best.quantized, best.pull))
        return best.quantized


def default_damping(k: int, rows: int) -> float:
    """Damping for K channels seen on so many rows: the fewer rows, the less the Gram matrix says about others.

    Measured in docs/architecture.md: 0.01 after 2048 rows at K = 1536 is worse than rounding with clip.
    """
    return _LEAST_DAMPING + _SHARE * k / max(rows, 1)


def round_by_rows(w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
    """How `pack` rounds what `gptq` has not: the parameters of groups by the rows, codes to the nearest.

    Case 1: the rows lie in few directions and show each often: a constant input, copies of one row. The clip search
            takes channels as unrelated, and errors of channels that go together add up instead of cancelling: the whole
            Gram matrix must tell, and so it does in error-compensated rounding, which leaves other directions their
            precision by its damping. Kept where rows held aside confirm it.
    Case 2: all others: `round_with_clip`.
    """
    if statistics is None or not _few_directions(statistics):
        return round_with_clip(w, spec, statistics)
    others: list[Fit] = [partial(rounding, w, spec) for rounding in (round_to_nearest, round_with_clip)]
    found = fitted(w, statistics, lambda rows: ErrorCompensated()(w, spec, rows), others)
    return found or round_with_clip(w, spec, statistics)


def _few_directions(statistics: Statistics) -> bool:
    most = min(len(statistics.gram) // _CHANNELS, statistics.rows // _ROWS)
    return statistics.sample is not None and 1 <= statistics.directions(most) <= most


class _Candidate:
    """The best rounding so far of each column of w (K, N), with its exact output error.

    pull (K, N): G (W - Ŵ) by the damped G, from which each step starts; the error takes what damping adds off it.
    """

    def __init__(self, w: Array, statistics: Statistics, damped: Array, quantized: Quantized) -> None:
        self.w, self.damped, self.quantized = w, damped, quantized
        self.rotation = statistics.rotation
        own = np.diagonal if self.rotation is None else self.rotation.diagonal_before
        self.added = own(damped) - own(statistics.gram)
        self.pull, self.errors = self._judged(quantized, None)

    def _judged(self, quantized: Quantized, pull: Array | None) -> tuple[Array, Array]:
        delta = self.w - quantized.dequantize()
        pull = self.damped @ delta if pull is None else pull
        return pull, np.einsum("kn,kn->n", delta, pull - self._taken(delta))

    def _taken(self, delta: Array) -> Array:
        """What damping adds to `pull`, (K, N): it raised the diagonal, that of the channels before their rotation."""
        if self.rotation is None:
            return np.asarray(self.added[:, None] * delta)
        return self.rotation.rows(self.added[:, None] * self.rotation.rows_before(delta))

    def improve(self, other: Quantized, pull: Array | None = None) -> None:
        """Take over every column that `other` rounds with less error. pull: where it is known."""
        pull, errors = self._judged(other, pull)
        better = errors < self.errors
        self.quantized = merge_columns(self.quantized, other, better)
        self.pull, self.errors = np.where(better, pull, self.pull), np.minimum(errors, self.errors)


_MOST_DAMPING, _MOST_SWEEPS = 1000, 1000


class Gptq(Pass):
    """Choose codes by error-compensated rounding on the Gram matrix (act-order, static groups, refit scales).

    Where the pass behind would not store them (`refuses_codes`), none are chosen.
    """

    name: ClassVar[str] = "gptq"
    reads: Set[Reads] = frozenset({Reads.STATISTICS})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.CODES})

    def __init__(
        self,
        policy: Policy,
        refused: Refused | None = None,
        *,
        damping: float | Literal["auto"] = "auto",
        sweeps: int = 2,
        refit: bool = True,
    ) -> None:
        super().__init__()
        if damping != "auto" and not 0 <= damping <= _MOST_DAMPING:
            raise UserError(f"gptq: damping must be 'auto' or a number from 0 to {_MOST_DAMPING}, got {damping}")
        if not 0 <= sweeps <= _MOST_SWEEPS:
            raise UserError(f"gptq: sweeps must be 0 to {_MOST_SWEEPS}, got {sweeps}")
        self.policy, self.refused = policy, refused or (lambda linear: "")
        self.rounding = ErrorCompensated(None if damping == "auto" else damping, sweeps, refit)

    @property
    def rounds_by(self) -> Rounding:
        """The same without its slow refinements."""
        return ErrorCompensated(self.rounding.damping, sweeps=0, refit=False)

    def call(self, region: Region) -> None:
        """Leave the codes of every linear with statistics in its weight's state, for the pass that stores them."""
        vocabulary = region.vocabulary
        together: dict[tuple[int, Grid], list[Linear]] = {}
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
            together.setdefault((id(linear.activation), spec), []).append(linear)
        with ThreadPoolExecutor(allowed(_THREADS)) as pool:
            jobs = [(group, spec, region.statistics[group[0].activation]) for (_, spec), group in together.items()]
            for linear, codes, decision in itertools.chain.from_iterable(pool.map(lambda job: self._round(*job), jobs)):
                self.decisions.append(decision)
                if codes is not None:
                    own = weight_state(linear.weight).codes
                    set_weight(linear.weight, codes={**own, linear.transposed: codes})

    def _round(self, linears: list[Linear], spec: Grid, statistics: Statistics) -> list[_Rounded]:
        """Round the weights that share an input side by side: columns do not affect each other."""
        wanted = np.concatenate([coded(linear) for linear in linears], axis=1)
        others: list[Fit] = [lambda rows: round_to_nearest(wanted, spec, rows)]
        if not spec.fine:  # else `pack` and `qdq` do not clip
            others.append(lambda rows: round_with_clip(wanted, spec, rows))
        joint = fitted(wanted, statistics, lambda rows: self.rounding(wanted, spec, rows), others)
        if joint is None:
            reason = too_few(statistics) or NOT_CONFIRMED
            return [(linear, None, Decision(linear.name, "skipped", reason)) for linear in linears]
        start, found = 0, list[_Rounded]()
        for linear in linears:
            stop = start + linear.shape[1]
            part, w = _columns(joint, start, stop), wanted[:, start:stop]
            error = relative_error(part.dequantize() - w, w, statistics.gram)
            decision = Decision(linear.name, "rounded", "error-compensated", {"relative_error": error})
            found.append((linear, part, decision))
            start = stop
        return found


def _columns(q: Quantized, start: int, stop: int) -> Quantized:
    part = QParams(q.qparams.scale[:, start:stop], q.qparams.zero_point[:, start:stop])
    return Quantized(np.ascontiguousarray(q.codes[:, start:stop]), part, q.spec)


def _compensate(w: Array, by: Compensation, qparams: QParams, spec: Grid, *, rows: Rows = nearest) -> Quantized:
    """The GPTQ sweep over w (K, N)."""
    k, order, upper = len(w), by.order, by.factor
    round_row, work, codes = rows(qparams, spec, k), w[order], np.empty(w.shape, np.float32)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block, errors = work[start:stop], np.empty((stop - start, w.shape[1]), np.float32)
        for i in range(stop - start):
            row = start + i
            codes[order[row]], decoded = round_row(order[row], block[i])
            errors[i] = (block[i] - decoded) / upper[row, row]
            block[i + 1 :] -= upper[row, row + 1 : stop, None] * errors[i]
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return Quantized(codes.astype(spec.code_dtype), qparams, spec)


def _descend(
    gram: Array, q: Quantized, pull: Array, *, steps: Callable[[Quantized], Descent] = descent
) -> tuple[Quantized, Array]:
    """One pass of coordinate descent: each code set to its best value with all other codes fixed.

    pull: G (W - Ŵ), (K, N). Returns the new codes, and what it is with them.
    """
    (k, n), moving, pull = pull.shape, steps(q), pull.copy()
    diagonal = np.diagonal(gram)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        local, change = gram[start:stop, start:stop], np.zeros((stop - start, n), np.float32)
        block = pull[start:stop].copy()
        for i in range(stop - start):
            change[i] = moving.move(start + i, block[i], diagonal[start + i])
            block[i + 1 :] -= local[i + 1 :, i, None] * change[i]
        pull -= gram[:, start:stop] @ change
    return moving.result(), pull


def _refit_scales(gram: Array, q: Quantized, pull: Array) -> Quantized:
    """The least-squares group scales for fixed codes: with A the group-wise levels, a column's scales s become s + d,
    (AᵀGA) d = AᵀG (w - A s). pull: G (W - Ŵ), (K, N).
    """
    spec, (k, n) = q.spec, pull.shape
    groups, size = spec.groups(k), spec.group_size(k)
    levels = spec.decode(q.codes, QParams(np.ones_like(q.qparams.scale), q.qparams.zero_point))
    starts = np.arange(0, k, size)
    right = np.add.reduceat(levels * pull, starts, axis=0)
    normal = np.empty((n, groups, groups), np.float64)
    for j in range(groups):
        begin, end = j * size, min((j + 1) * size, k)
        product = levels[:end] * (gram[:end, begin:end] @ levels[begin:end])
        normal[:, j, : j + 1] = normal[:, : j + 1, j] = np.add.reduceat(product, starts[: j + 1], axis=0).T
    diagonal = np.einsum("nii->ni", normal)
    diagonal += 1e-4 * diagonal + 1e-9 * diagonal.max(initial=0.0) + 1e-30
    change = np.linalg.solve(normal, right.T.astype(np.float64)[..., None])[..., 0].T
    solved = (q.qparams.scale + change).astype(np.float32)
    usable = np.isfinite(solved) & (np.abs(solved) > 0)
    if spec.positive:
        usable &= solved > 0
    scale = spec.storable(np.where(usable, solved, q.qparams.scale))
    return Quantized(q.codes, QParams(scale, q.qparams.zero_point), spec)
