"""Random weights that behave like trained ones: correlated activations, columns of unequal size, heavy tails."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def linear_weight(rng: np.random.Generator, k: int, n: int, *, gain: float = 1.0) -> Array:
    """A (K, N) weight: Student-t entries, log-normal column scales, output variance near gain² for unit inputs."""
    columns = np.exp(0.4 * rng.standard_normal(n) - 0.16)
    w: Array = (rng.standard_t(5, (k, n)) * columns * (gain * np.sqrt(0.6 / k))).astype(np.float32)
    return w


def embedding_table(rng: np.random.Generator, vocab: int, k: int) -> Array:
    """A (V, K) table with decaying spectrum, so that the channels of its rows are correlated; entries near 0.4."""
    rank = max(k // 4, 1)
    spectrum = 1.0 / np.sqrt(1.0 + np.arange(rank))
    smooth = (rng.standard_normal((vocab, rank)) * spectrum) @ rng.standard_normal((rank, k))
    table: Array = (0.4 * smooth / smooth.std() + 0.12 * rng.standard_normal((vocab, k))).astype(np.float32)
    return table


def norm_scale(rng: np.random.Generator, k: int, *, outliers: bool) -> Array:
    """The scale (K,) of a norm; with `outliers` about one channel in 24 is twenty times the others."""
    gamma = 1.0 + 0.1 * rng.standard_normal(k)
    if outliers:
        gamma[rng.choice(k, size=max(k // 24, 1), replace=False)] *= 20.0
    return gamma.astype(np.float32)


def with_loud_columns(rng: np.random.Generator, w: Array, *, outliers: bool) -> Array:
    """w (K, N) with a few columns enlarged eight times: outlier channels for the linear that follows."""
    if outliers:
        w = w.copy()
        w[:, rng.choice(w.shape[1], size=max(w.shape[1] // 32, 1), replace=False)] *= 8.0
    return w
