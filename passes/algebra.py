"""Linear algebra on Gram matrices: damping, and a factor of the inverse."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array

Array64 = npt.NDArray[np.float64]

# Triangles up to this size are inverted by LAPACK.
_SMALL = 128


def damped(gram: Array, damping: float) -> Array:
    """The Gram matrix (K, K) with its diagonal raised, each channel by a fraction of itself.

    Relative to the channel, not to the mean as usual: one outlier channel must not drown the others in damping. Dead
    channels get a trace of the mean, so that the result is positive definite.
    """
    diagonal = np.diagonal(gram).astype(np.float64)
    floor = 1e-6 * float(diagonal.mean()) + 1e-12
    raised = gram.copy()
    np.fill_diagonal(raised, (diagonal * (1 + damping) + floor).astype(np.float32))
    return raised


def inverse_factor(gram: Array) -> Array64:
    """Upper triangular U (K, K) with UᵀU = gram⁻¹, from the Cholesky factor of the matrix read backwards."""
    backwards = np.linalg.cholesky(gram[::-1, ::-1].astype(np.float64))
    return _inverse_lower(backwards)[::-1, ::-1]


@dataclass(frozen=True, eq=False)
class Compensation:
    """What error compensation takes of a Gram matrix G (K, K).

    order: the channels as they are rounded, int64 (K,): those of most energy first. factor: U of `inverse_factor` with
    its channels in that order, float32 (K, K).
    """

    order: npt.NDArray[np.int64]
    factor: Array

    @classmethod
    def of(cls, gram: Array) -> "Compensation":
        """That of a positive definite G."""
        order = np.argsort(-np.diagonal(gram), kind="stable")
        return cls(order, inverse_factor(gram[order][:, order]).astype(np.float32))

    def rescaled(self, by: Array) -> "Compensation":
        """That of G / (s sᵀ), s (K,): the factor of its inverse is U with columns times s. The order is kept."""
        return Compensation(self.order, self.factor * by[self.order].astype(np.float32))


def _inverse_lower(lower: Array64) -> Array64:
    """The inverse of a lower triangular matrix, by halves."""
    size = lower.shape[0]
    if size <= _SMALL:
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float64)
    half = size // 2
    top, bottom = _inverse_lower(lower[:half, :half]), _inverse_lower(lower[half:, half:])
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = top, bottom
    inverse[half:, :half] = -bottom @ (lower[half:, :half] @ top)
    return inverse
