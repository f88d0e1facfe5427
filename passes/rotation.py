"""Rotating an activation within blocks of channels: Hadamard matrices with random signs (QuIP, Chee et al. 2023).

R (K, K) has one matrix M of `block` rows along its diagonal, M = diag(signs) H / √block with H of Sylvester's
construction. It is orthogonal, so (X R) (Rᵀ W) = X W for every W; what it changes is the rounding of both: an outlier
of one channel becomes a 1 / √block of it in each channel of its block, and a sum of many weights is nearly normal.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from qcompile.passes.affine import Array

# Channels of a block at most: what a rotation of all channels gains beyond that is 0.4 dB (docs/architecture.md); and
# at least: a sum of fewer numbers is as uneven as they are.
MOST, LEAST = 64, 16
# Rows of a matrix that are made symmetric at once.
_BAND = 512
# How the names of the initializers begin that hold a rotation's matrix.
MATRIX = "qcompile.hadamard."


@dataclass(frozen=True, eq=False)
class Rotation:
    """signs: of the channels of a block, the same in each, ±1, float32 (block,)."""

    signs: Array

    @classmethod
    def of(cls, channels: int, seed: int) -> "Rotation | None":
        """In the largest blocks, powers of two, that divide so many channels; None where these are below `LEAST`."""
        block = min(channels & -channels, MOST)
        if block < LEAST:
            return None
        return cls(np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), block))

    @property
    def matrix(self) -> Array:
        """M, float32 (block, block): a block of channels x becomes x M."""
        block = len(self.signs)
        return self.signs[:, None] * hadamard(block) / np.float32(np.sqrt(block))

    def turned(self, x: Array) -> Array:
        """X R of rows (…, K)."""
        return np.asarray((x.reshape(-1, len(self.signs)) @ self.matrix).reshape(x.shape))

    def reach(self, peaks: Array) -> Array:
        """How far X R may reach in the channels of each block (K / block,), by the peaks (K,) of those of X: no row is
        longer within a block than the peaks, no turned number larger than its row within its block is long.
        """
        return np.asarray(np.linalg.norm(peaks.reshape(-1, len(self.signs)), axis=1))

    def back(self, x: Array) -> Array:
        """X Rᵀ of rows (…, K): what `turned` made of it is undone."""
        return np.asarray((x.reshape(-1, len(self.signs)) @ self.matrix.T).reshape(x.shape))

    def rows(self, w: Array) -> Array:
        """Rᵀ W of a weight (K, N)."""
        blocks = w.reshape(-1, len(self.signs), w.shape[1])
        return np.asarray((self.matrix.T @ blocks).reshape(w.shape))

    def rows_before(self, w: Array) -> Array:
        """R W: what `rows` made of it is undone."""
        blocks = w.reshape(-1, len(self.signs), w.shape[1])
        return np.asarray((self.matrix @ blocks).reshape(w.shape))

    def gram(self, gram: Array) -> Array:
        """Rᵀ G R, symmetric: the Gram matrix (K, K) of X R, by that of X."""
        return _symmetric(self.turned(self.rows(gram)))

    def gram_before(self, gram: Array) -> Array:
        """R G Rᵀ: that of X by that of X R."""
        return _symmetric(self.back(np.ascontiguousarray(self.back(gram).T)))

    def diagonal_before(self, gram: Array) -> Array:
        """The diagonal (K,) of `gram_before`, which the blocks along that of G tell."""
        block = len(self.signs)
        starts = range(0, len(gram), block)
        blocks = np.stack([gram[start : start + block, start : start + block] for start in starts])
        return np.asarray(np.einsum("ij,bjk,ik->bi", self.matrix, blocks, self.matrix, optimize=True).reshape(-1))

    def raised(self, gram: Array, added: Array) -> Array:
        """G (K, K) of X R with `added` (K,) on the diagonal of that of X: Rᵀ diag(added) R lies in the blocks."""
        made, block = gram.copy(), len(self.signs)
        for start in range(0, len(gram), block):
            rows = slice(start, start + block)
            made[rows, rows] += self.matrix.T @ (added[rows, None] * self.matrix)
        return made


def _symmetric(matrix: Array) -> Array:
    """(M + Mᵀ) / 2, in place: the Gram matrices of a wide input are most of what a compile holds."""
    for start in range(0, len(matrix), _BAND):
        stop = start + _BAND
        mean = (matrix[start:stop, start:] + matrix[start:, start:stop].T) / 2
        matrix[start:stop, start:], matrix[start:, start:stop] = mean, mean.T
    return matrix


@cache
def hadamard(size: int) -> Array:
    """Sylvester's matrix of ±1, float32 (size, size), of a power of two."""
    made = np.ones((1, 1), np.float32)
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made
