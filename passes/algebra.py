"""Linear algebra on Gram matrices: sums, damping, and Cholesky's factor, in place and by blocks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array
from qcompile.passes.threads import side_by_side

Array64 = npt.NDArray[np.float64]

# Columns of a factor that are made at once, and rows of them in one piece of work.
_BLOCK, _ROWS = 128, 512
# Rows that are put in order at once.
_RUN = 16
# Rows and columns of a part of a Gram matrix that one thread sums.
_TILE = 512
# What float32 may be off by: of the channels' correlations, beside which 0.01 at least are added to their diagonal.
_RESIDUAL = 1e-4


def add_gram(total: Array, rows: Array, sign: Literal[1, -1] = 1) -> None:
    """Add XᵀX of rows X (n, K), or take it from, a matrix (K, K), in place: its lower triangle, which is half of the
    work. `mirror` makes the rest of it. One thread sums a tile, so that nothing depends on the number of threads.
    """
    update = np.add if sign == 1 else np.subtract

    def tile(place: tuple[slice, slice]) -> None:
        a, b = place
        update(total[place], rows[:, a].T @ rows[:, b], out=total[place])

    parts = [slice(start, start + _TILE) for start in range(0, len(total), _TILE)]
    side_by_side(tile, [(a, b) for number, a in enumerate(parts) for b in parts[: number + 1]])


def mirror(matrix: Array) -> Array:
    """Make a matrix (K, K) symmetric, in place, by its lower triangle."""
    for start, stop in _blocks(len(matrix)):
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def damping_of(diagonal: Array, damping: float) -> Array:
    """What damping adds to the diagonal (K,) of a Gram matrix: a fraction of each channel's own energy.

    Relative to the channel, not to the mean as usual: one outlier channel must not drown the others in damping. Dead
    channels get a trace of the mean, so that the result is positive definite.
    """
    exact = diagonal.astype(np.float64)
    return np.asarray(damping * exact + (1e-6 * float(exact.mean()) + 1e-12), np.float32)


@dataclass(frozen=True, eq=False)
class Compensation:
    """What error compensation takes of a positive definite Gram matrix G (K, K).

    gram, added: G but for its diagonal, and what is to be added to that (K,). by: channels of G are divided by these
    (K, 1), or for each column of a weight by others (K, N); None where by nothing.
    order: the channels, int64 (K,), from the last to be rounded to the first: those of most energy at the end, so many
    that share a code beside each other.
    lower: L, float32 (K, K), of which the lower triangle is meant: G in that order is s L Lᵀ s, s = `scale`
    shaped like `by`.
    """

    gram: Array
    added: Array
    order: npt.NDArray[np.int64]
    lower: Array
    scale: Array
    by: Array | None = None

    @classmethod
    def of(cls, gram: Array, added: Array, together: int = 1) -> "Compensation":
        """That of a Gram matrix with a diagonal (K,) added to it, for codes of so many channels.

        In float32, or in float64 and rounded to it where the matrix is too near to a singular one for that. One that
        sums in float32 left indefinite has more added, as little of each channel's energy as will do.
        """
        diagonal = np.diagonal(gram) + added
        order = _rising(diagonal, together)
        lower = _in_order(gram, diagonal, order)
        if not _factored(lower) or _residual(lower, gram, diagonal, order) > _RESIDUAL:
            shares = (0.0, *10.0 ** np.arange(-6, 3))
            exact = ((own, _in_order(gram, diagonal * (1 + own), order).astype(np.float64)) for own in shares)
            more, found = next((own, matrix) for own, matrix in exact if _factored(matrix))
            lower, added = found.astype(np.float32), np.asarray(added + more * diagonal, np.float32)
        return cls(gram, added, order, lower, np.ones((len(order), 1), np.float32))

    def rescaled(self, by: Array) -> "Compensation":
        """That of G / (b bᵀ), b (K,) or for each column (K, N), with the order and the factor of G; none is copied."""
        by = by.reshape(len(by), -1)
        scale = np.asarray(self.scale / by[self.order], np.float32)
        return replace(self, scale=scale, by=by if self.by is None else self.by * by)

    def followed(self, gram: Array, by: Array) -> "Compensation":
        """The same of G / (b bᵀ), b (K,), which is given."""
        own = self.rescaled(by)
        return replace(own, gram=gram, added=np.asarray(self.added / np.square(by), np.float32), by=None)

    def of_columns(self, columns: npt.NDArray[np.int64]) -> "Compensation":
        """That for some of the columns."""
        if self.by is None or self.by.shape[1] == 1:
            return self
        return replace(self, scale=self.scale[:, columns], by=self.by[:, columns])

    @cached_property
    def diagonal(self) -> Array:
        """That of G, (K, 1) or of each column (K, N)."""
        own = (np.diagonal(self.gram) + self.added)[:, None]
        return np.asarray(own if self.by is None else own / np.square(self.by), np.float32)

    @property
    def damped(self) -> tuple[Array, Array]:
        """(G but for its diagonal (K, K), what is to be added to that (K,))."""
        if self.by is None:
            return self.gram, self.added
        (by,) = self.by.T  # one for all columns
        gram: Array = self.gram / by[:, None] / by
        return gram, np.asarray(self.added / np.square(by), np.float32)

    def damping(self, x: Array) -> Array:
        """What the damping adds to the squares that G makes of x (K, n), of each column (n,)."""
        squares = x if self.by is None else x / self.by
        return np.asarray(self.added @ np.square(squares), np.float32)

    def transposed_times(self, x: Array) -> Array:
        """(s L)ᵀ x of x (K, n), all in `order`; the squares of a column of it are what G makes of one of x."""
        scaled, result = x * self.scale, np.empty_like(x)
        for start, stop in _blocks(len(x)):
            corner = np.tril(self.lower[start:stop, start:stop])
            result[start:stop] = corner.T @ scaled[start:stop] + self.lower[stop:, start:stop].T @ scaled[stop:]
        return result

    def times(self, e: Array) -> Array:
        """s L e of e (K, n), all in `order`."""
        result = np.empty_like(e)
        for start, stop in _blocks(len(e)):
            corner = np.tril(self.lower[start:stop, start:stop])
            result[start:stop] = corner @ e[start:stop] + self.lower[start:stop, :start] @ e[:start]
        result *= self.scale
        return result


def cholesky(matrix: Array | Array64) -> None:
    """Put L with L Lᵀ = the symmetric matrix (K, K) in the place of its lower triangle; the rest is left as it is.

    LinAlgError where it is not positive definite to the precision of its numbers.
    """
    for start, stop in _blocks(len(matrix)):
        left = matrix[start:stop, :start]
        corner = np.linalg.cholesky((matrix[start:stop, start:stop] - left @ left.T).astype(np.float64))
        matrix[start:stop, start:stop] = corner
        below = _Below(matrix, start, stop, np.asarray(np.linalg.inv(corner).T, np.float64))
        side_by_side(below, range(stop, len(matrix), _ROWS))


@dataclass(frozen=True, eq=False)
class _Below:
    """Makes rows of L below the corner that ends at column `stop`; inverse: that of the corner, transposed."""

    matrix: Array | Array64
    start: int
    stop: int
    inverse: Array64

    def __call__(self, row: int) -> None:
        rows, columns = slice(row, row + _ROWS), slice(self.start, self.stop)
        known = self.matrix[rows, : self.start] @ self.matrix[columns, : self.start].T
        self.matrix[rows, columns] = (self.matrix[rows, columns] - known) @ self.inverse.astype(self.matrix.dtype)


def _blocks(k: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, k)) for start in range(0, k, _BLOCK)]


def _rising(energy: Array, together: int) -> npt.NDArray[np.int64]:
    """Channels by rising energy, int64 (K,), runs of so many by that of all of them; what is left over comes last."""
    whole = len(energy) // together * together
    runs = np.argsort(energy[:whole].reshape(-1, together).sum(axis=1), kind="stable")
    return np.append((runs[:, None] * together + np.arange(together)).reshape(-1), np.arange(whole, len(energy)))


def _in_order(gram: Array, diagonal: Array, order: npt.NDArray[np.int64]) -> Array:
    """The matrix with that diagonal and its channels in that order, in memory of its own; its lower triangle, of which
    the other one takes no memory.
    """
    found = np.zeros_like(gram)
    for start in range(0, len(gram), _RUN):
        rows = np.take(gram, order[start : start + _RUN], axis=0)
        stop = start + len(rows)
        np.take(rows, order[:stop], axis=1, out=found[start:stop, :stop], mode="clip")  # "raise" would copy each
    np.fill_diagonal(found, diagonal[order])
    return found


def _factored(matrix: Array | Array64) -> bool:
    try:
        cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def _residual(lower: Array, gram: Array, diagonal: Array, order: npt.NDArray[np.int64]) -> float:
    """How far L Lᵀ is from the matrix, of the correlations that they mean: by a product with signs of a seed."""
    size = np.sqrt(diagonal)
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), len(size))
    x = np.asarray(signs / size, np.float32)
    wanted = gram @ x + (diagonal - np.diagonal(gram)) * x
    own = Compensation(gram, diagonal, order, lower, np.ones((len(size), 1), np.float32))
    found = own.times(own.transposed_times(x[order][:, None]))[:, 0]
    error = np.linalg.norm((found - wanted[order]) / size[order]) / np.sqrt(len(size))
    return float(error) if np.isfinite(error) else np.inf
