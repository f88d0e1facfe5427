"""Sufficient statistics of an activation: what every pass needs instead of the activations themselves."""

from dataclasses import dataclass

import numpy as np

from qcompile.passes.affine import Array
from qcompile.passes.algebra import damped, solve

# How strongly a corrected weight is held to the original, as a fraction of each channel's energy.
_PULL = 0.05


@dataclass
class Statistics:
    """Statistics of one activation value X (rows, K), summed over all calibration batches.

    gram: XᵀX, float32 (K, K). With it the loss of any weight change D (K, N) is exact: ‖X D‖² = tr(Dᵀ gram D).
    absmax: largest magnitude of each channel, float32 (K,).
    cross: XᵀX₀ (K, K) with X₀ the same activation in the float model; None where the inputs were not yet quantized.
    """

    rows: int
    gram: Array
    absmax: Array
    cross: Array | None = None

    @property
    def mean_square(self) -> Array:
        """E[x²] of each channel, float32 (K,)."""
        return np.diagonal(self.gram) / np.float32(max(self.rows, 1))

    def rescale(self, factor: Array) -> None:
        """Follow a rewrite that divides channel k of the activation by factor[k] (K,)."""
        inverse = (1.0 / factor).astype(np.float32)
        self.gram = self.gram * inverse[:, None] * inverse[None, :]
        if self.cross is not None:
            self.cross = self.cross * inverse[:, None] * inverse[None, :]
        self.absmax = self.absmax * np.abs(inverse)

    def target(self, w: Array) -> Array:
        """The weight (K, N) that best reproduces the float model's X₀ w from X; w itself without `cross`.

        Minimizes ‖X w' - X₀ w‖² with a small pull towards w, as in asymmetric calibration (GPTAQ, Li et al. 2025).
        """
        if self.cross is None:
            return w
        diagonal = np.diagonal(self.gram)
        raised = damped(self.gram, _PULL)
        pull = np.diagonal(raised) - diagonal
        return solve(raised, self.cross @ w + pull[:, None] * w)

    def add(self, other: "Statistics") -> None:
        """Add the statistics of a second activation that meets the same weight."""
        self.rows += other.rows
        self.gram = self.gram + other.gram
        self.absmax = np.maximum(self.absmax, other.absmax)
        if self.cross is not None and other.cross is not None:
            self.cross = self.cross + other.cross
        else:
            self.cross = None
