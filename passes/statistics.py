"""Sufficient statistics of an activation: what every pass needs instead of the activations themselves."""

from dataclasses import dataclass

import numpy as np

from qcompile.passes.affine import Array


@dataclass
class Statistics:
    """Statistics of one activation value X (rows, K), summed over all calibration batches.

    gram: XᵀX, float32 (K, K). With it the loss of any weight change D (K, N) is exact: ‖X D‖² = tr(Dᵀ gram D).
    absmax: largest magnitude of each channel, float32 (K,).
    """

    rows: int
    gram: Array
    absmax: Array

    @property
    def mean_square(self) -> Array:
        """E[x²] of each channel, float32 (K,)."""
        return np.diagonal(self.gram) / np.float32(max(self.rows, 1))

    def rescale(self, factor: Array) -> None:
        """Follow a rewrite that divides channel k of the activation by factor[k] (K,)."""
        inverse = (1.0 / factor).astype(np.float32)
        self.gram = self.gram * inverse[:, None] * inverse[None, :]
        self.absmax = self.absmax * np.abs(inverse)
