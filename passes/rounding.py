"""How a weight becomes codes. `awq` and `smooth` judge their candidates by the rounding that will follow them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array, Grid, QParams, Quantized, output_error
from qcompile.passes.held import confirmed, too_few
from qcompile.passes.native import Loops, widened
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import side_by_side
from qcompile.passes.workers import mapped

# Of so many rows one may be held aside and not be fitted to at all: the fit is as good.
_SMALL_SHARE = 16
# A chunk of columns has so many numbers at most, and so many columns; the least of them whatever its rows.
_NUMBERS, _WIDEST, _LEAST = 1 << 23, 1024, 64
# Numbers that plain rounding works on at once: 2 MB of float32.
_BLOCK = 1 << 19
# Channels above which inputs are worked on one after the other.
_ALONE = 2048
# Columns, evenly spread, by which rows held aside judge.
_JUDGED = 512
T = TypeVar("T")
R = TypeVar("R")


class Weight(Protocol):
    """What is read of a weight (K, N) of any float type: an array, mapped or not, or several side by side."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N)."""

    def __getitem__(self, place: tuple[slice, slice], /) -> npt.NDArray[np.floating]:
        """Columns."""


class Rounding(Protocol):
    """Quantizes a weight w (K, N) on the grid of `spec`, with the statistics of its input where there are any."""

    def __call__(self, w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
        """The codes and their parameters."""


@runtime_checkable
class Prepared(Protocol):
    """A rounding that keeps something with statistics which all chunks of a weight need."""

    def prepare(self, statistics: Statistics, spec: Grid) -> None:
        """Make it."""

    def told(self, w: Array, spec: Grid, statistics: Statistics) -> tuple[Array, Array]:
        """What w (K, N) is rounded to, Ŵ (K, N), and ‖X (Ŵ - W)‖² of each column (N,), which it knows without a product
        by the Gram matrix.
        """


def round_to_nearest(w: Weight, spec: Grid, statistics: Statistics | None) -> Quantized:
    """Plain rounding on the range of each group; uses no statistics.

    w: of any float type, and read by the block: a mapped table is never held as a whole, and what is made of a block
    stays in a core's own cache.
    """
    return by_blocks(None, w, spec)


def by_blocks(fit: Callable[[Array], QParams] | None, w: Weight, spec: Grid) -> Quantized:
    """The nearest codes of w (K, N) on what `fit` makes of blocks of whole groups; None: on the range of each."""
    k, n = w.shape
    codes, (scale, zero_point) = np.empty((k, n), spec.code_dtype), np.empty((2, spec.groups(k), n), np.float32)
    size, turned = max(spec.group_size(k), 1), isinstance(w, np.ndarray) and w.strides[0] < w.strides[1]
    loops = Loops.of(spec) if fit is None else None

    def one(columns: slice) -> None:
        for rows, own in _blocks(k, columns, size, turned=turned):
            groups = slice(rows.start // size, -(-rows.stop // size))
            if loops is not None:
                loops.nearest(w[rows, own], size, codes[rows, own], scale[groups, own], zero_point[groups, own])
                continue
            block = np.asarray(w[rows, own], np.float32)
            qparams = (fit or spec.fit)(block)
            scale[groups, own], zero_point[groups, own] = qparams.scale, qparams.zero_point
            codes[rows, own] = spec.project(block, qparams)

    side_by_side(one, chunks(k, n))
    return Quantized(codes, QParams(scale, zero_point), spec)


def _blocks(k: int, columns: slice, size: int, *, turned: bool) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of whole groups of `size` rows, of about _BLOCK numbers that lie near each other: rows side by
    side, or, of a weight that is turned, columns.
    """
    width = min(columns.stop - columns.start, max(_LEAST, _BLOCK // ((k if turned else size) or 1)))
    deep = max(1, _BLOCK // (size * max(width, 1))) * size
    for first in range(columns.start, columns.stop, max(width, 1)):
        for start in range(0, k, deep):
            yield slice(start, min(start + deep, k)), slice(first, min(first + width, columns.stop))


def blank(w: Array, spec: Grid) -> Quantized:
    """Codes of the sizes that those of w have, all of them 0: for a dry run, which reads no weight."""
    k, n = w.shape
    ones = np.broadcast_to(np.float32(1), (spec.groups(k), n))
    codes = np.broadcast_to(np.zeros((), spec.code_dtype), (k, n))
    return Quantized(codes, QParams(ones, np.broadcast_to(np.float32(0), ones.shape)), spec)


def round_with_clip(w: Weight, spec: Grid, statistics: Statistics | None) -> Quantized:
    """Rounding on ranges clipped by E[x²]-weighted search, column by column only where that lowers ‖X(Ŵ - W)‖²; plain
    rounding where rows held aside do not confirm that.
    """
    if statistics is None:
        return round_to_nearest(w, spec, statistics)
    return fitted(w, spec, statistics, _clipped, [round_to_nearest]) or round_to_nearest(w, spec, None)


def _clipped(w: Array, spec: Grid, statistics: Statistics | None) -> Quantized:
    plain = round_to_nearest(w, spec, None)
    if statistics is None:
        return plain
    qparams = spec.fit(w, statistics.energy)
    return better_columns(plain, Quantized(spec.project(w, qparams), qparams, spec), w, statistics)


def fitted(
    w: Weight, spec: Grid, statistics: Statistics, make: Rounding, others: Sequence[Rounding]
) -> Quantized | None:
    """What `make` makes of w (K, N) by the statistics of all rows; None where rows held aside show no gain over each of
    the `others`, all fitted to the same rows.

    Case 1: guessed statistics, or those that `split` gave to somebody who judges: nothing is held aside.
    Case 2: too few rows: None.
    Case 3: of many rows, those held aside are a small share, and what was judged is what is given.

    Columns do not affect each other: they are rounded by the chunk, which bounds the memory; by `workers`.
    """
    if statistics.sample is None:  # Case 1
        return _made(w, spec, statistics, make)
    parts = statistics.split()
    if parts is None or too_few(statistics):  # Case 2
        return None
    rest, held = parts
    if rest.rotation is None:
        rest.kept = {}  # channels are to be rounded in the order of their energies as they are now
    step = max(1, w.shape[1] // _JUDGED)
    if isinstance(make, Prepared):
        make.prepare(rest, spec)

    found = mapped(
        _tried,
        chunks(*w.shape),
        load=lambda own: (slice(-own.start % step, None, step), _read(w, own)),
        given=(make, others, spec, rest, held),
    )
    losses = [np.sum(own, axis=0) for own in zip(*(judged for _, judged in found), strict=True)]
    if any(confirmed(other, losses[0], statistics) >= 1 for other in losses[1:]):
        return None
    if len(held) * _SMALL_SHARE <= statistics.rows:  # Case 3
        return _joined(spec, [made for made, _ in found])
    every = replace(statistics, kept={})
    if isinstance(make, Prepared):
        make.prepare(every, spec)
    return _made(w, spec, every, make)


def _tried(
    make: Rounding, others: Sequence[Rounding], spec: Grid, rest: Statistics, held: Array, judged: slice, w: Array
) -> tuple[Quantized, list[Array]]:
    """What is made of a chunk w (K, n) by the rest of the rows, and what it and the others lose on each of those held
    aside, (h,), by some of its columns.
    """
    made, seen = make(w, spec, rest), np.ascontiguousarray(w[:, judged])
    wanted = held @ seen
    found = [made.dequantize()[:, judged], *(other(seen, spec, rest).dequantize() for other in others)]
    return made, [np.square(held @ given - wanted).sum(axis=1) for given in found]


def _made(w: Weight, spec: Grid, statistics: Statistics, make: Rounding) -> Quantized:
    parts = mapped(_one, chunks(*w.shape), load=lambda own: (_read(w, own),), given=(make, spec, statistics))
    return _joined(spec, parts)


def _one(make: Rounding, spec: Grid, statistics: Statistics, w: Array) -> Quantized:
    return make(w, spec, statistics)


def chunks(k: int, n: int) -> list[slice]:
    """Columns of a weight (K, N) that are worked on together; the same however many threads there are."""
    width = min(_WIDEST, max(_LEAST, _NUMBERS // max(k, 1) // _LEAST * _LEAST))
    return [slice(start, min(start + width, n)) for start in range(0, n, width)] or [slice(0, 0)]


def by_input(
    compute: Callable[..., R],
    items: Sequence[T],
    *,
    load: Callable[[T], tuple[Any, ...]],
    given: tuple[Any, ...] = (),
    channels: Callable[[T], int],
) -> list[R]:
    """compute(*given, *load(item)) of inputs of linears, in order: side by side, but those of many channels one after
    the other, so that of their Gram matrices one is copied and factored at a time. In this process: what is long of it
    is shared with `workers` by the chunk, which keeps more of them busy than a few inputs could.
    """

    def one(item: T) -> R:
        return compute(*given, *load(item))

    large = [channels(item) > _ALONE for item in items]
    alone = iter([one(item) for item, own in zip(items, large, strict=True) if own])
    others = iter(side_by_side(one, [item for item, own in zip(items, large, strict=True) if not own]))
    return [next(alone if own else others) for own in large]


def _read(w: Weight, columns: slice) -> Array:
    return np.ascontiguousarray(widened(w[:, columns]))


def _joined(spec: Grid, parts: list[Quantized]) -> Quantized:
    if len(parts) == 1:
        return parts[0]
    scale = np.concatenate([part.qparams.scale for part in parts], axis=1)
    zero_point = np.concatenate([part.qparams.zero_point for part in parts], axis=1)
    return Quantized(np.concatenate([part.codes for part in parts], axis=1), QParams(scale, zero_point), spec)


def better_columns(a: Quantized, b: Quantized, w: Array, statistics: Statistics) -> Quantized:
    """For each column of w, the candidate with the smaller output error: by a, b with errors δ, ε the sign of
    ε G ε - δ G δ = (ε - δ) G (ε + δ), which takes one product.
    """
    first, second = a.dequantize(), b.dequantize()
    gain = np.einsum("kn,kn->n", second - first, statistics.times(first + second - 2 * w))
    return merge_columns(a, b, gain < 0)


def merge_columns(a: Quantized, b: Quantized, use_b: npt.NDArray[np.bool_]) -> Quantized:
    """Columns of b where use_b (N,) says so, else of a."""
    qparams = QParams(
        np.where(use_b, b.qparams.scale, a.qparams.scale),
        np.where(use_b, b.qparams.zero_point, a.qparams.zero_point),
    )
    return Quantized(np.where(use_b, b.codes, a.codes), qparams, a.spec)


def column_errors(delta: Array, gram: Array) -> Array:
    """‖X delta‖² of each column of delta (K, N), float32 (N,)."""
    errors: Array = np.einsum("kn,kn->n", delta, gram @ delta)
    return errors


def relative_error(delta: Array, w: Array, gram: Array) -> float:
    """‖X delta‖ / ‖X w‖, from gram = XᵀX."""
    reference = output_error(w, gram)
    return float(np.sqrt(output_error(delta, gram) / reference)) if reference > 0 else 0.0
