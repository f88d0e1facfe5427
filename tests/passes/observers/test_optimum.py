"""The ranges that percentile, mse and entropy choose, against the optimum by the formulas of the distributions."""

import ml_dtypes
import numpy as np
import pytest
from observing import FLOAT8, GRIDS, INT4_SYM, INT8_SYM, KNOWN, UINT8, UINT16, Known, observe

from qcompile.passes.affine import range_qparams
from qcompile.passes.observers.distribution import Distribution
from qcompile.passes.observers.entropy import Entropy
from qcompile.passes.observers.extremes import MinMax
from qcompile.passes.observers.grids import squared_error
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.percentile import Percentile
from qcompile.passes.spec import ActivationSpec

COUNT = 1_000_000
PARTS = 8  # of a cell, in entropy


def _observed(make: type, known: Known):
    return observe(make("x"), np.array_split(known.sample(COUNT), 4))


def _quantized(x: np.ndarray, low: float, high: float, grid: ActivationSpec) -> np.ndarray:
    qparams = range_qparams(np.float32(low), np.float32(high), grid)
    scale, zero_point = float(qparams.scale), float(qparams.zero_point)
    if grid.is_float:
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return (np.clip(np.rint(x / scale) + zero_point, grid.qmin, grid.qmax) - zero_point) * scale


def _integral(known: Known, low: float, high: float, grid: ActivationSpec) -> float:
    """E (x - Q(x))² by the density, over what the sample spans."""
    x = np.linspace(*known.quantile(np.array([0.5 / COUNT, 1 - 0.5 / COUNT])), 100_001)
    density = known.density(x)
    return float(np.sum(density * (x - _quantized(x, low, high, grid)) ** 2) / density.sum())


@pytest.mark.parametrize("grid", [UINT8, INT8_SYM, INT4_SYM], ids=["uint8", "int8", "int4"])
@pytest.mark.parametrize("name", KNOWN)
def test_mse_is_least_by_the_density(name, grid) -> None:
    """Within 1 % of the least error, and the clip within 8 % of its place (the minimum is flat)."""
    known = KNOWN[name]
    low, high = _observed(Mse, known).range(grid)
    largest = float(known.quantile(np.array([1 - 0.5 / COUNT]))[0])
    clips = largest * np.exp2(-np.arange(0, 5, 0.05))
    errors = [_integral(known, -clip, clip, grid) for clip in clips]
    assert _integral(known, low, high, grid) <= 1.01 * min(errors)
    np.testing.assert_allclose([-low, high], clips[np.argmin(errors)], rtol=0.08)


@pytest.mark.parametrize("grid", [*GRIDS, INT4_SYM], ids=[*map(str, GRIDS), "int4"])
@pytest.mark.parametrize(
    "numbers",
    [
        KNOWN["laplace"].sample(20_000),
        np.append(KNOWN["normal"].sample(20_000), 300),
        np.maximum(KNOWN["normal"].sample(20_000), 0),
        np.random.default_rng(0).dirichlet(np.full(32, 0.1), 600),
        np.where(np.arange(20_000) % 3, 5, -2) + 0.1 * KNOWN["normal"].sample(20_000),
    ],
    ids=["laplace", "outlier", "relu", "softmax", "bimodal"],
)
def test_mse_predicts_the_error_and_no_wide_search_finds_less(numbers, grid) -> None:
    """The histogram's expected error against the error of the numbers themselves, and against 225 other ranges."""
    own = observe(Mse("x"), np.array_split(numbers.ravel(), 3))
    x = numbers.ravel().astype(np.float32).astype(np.float64)
    low, high = own.range(grid)

    def error(low: float, high: float) -> float:
        return float(np.mean((x - _quantized(x, low, high, grid)) ** 2))

    (seen,) = own.distributions()
    predicted = squared_error(seen, np.array([low]), np.array([high]), grid)[0]
    assert predicted == pytest.approx(error(low, high), rel=0.05)
    shares = 2.0 ** -np.arange(0, 7.5, 0.5)
    ends = (min(x.min(), 0.0), max(x.max(), 0.0))
    least = min(error(a * ends[0], b * ends[1]) for a in shares for b in shares)
    assert error(low, high) <= 1.03 * least


def test_mse_keeps_the_extremes_where_steps_are_fine() -> None:
    own = _observed(Mse, KNOWN["laplace"])
    assert own.range(UINT16) == (own.low, own.high)


@pytest.mark.parametrize("make", [MinMax, Percentile, Mse, Entropy])
def test_one_sided_activations_have_one_sided_ranges(make) -> None:
    """Softmax outputs and what follows a ReLU: no code is left for negative numbers."""
    probabilities = np.random.default_rng(0).dirichlet(np.full(32, 0.1), 600)
    for numbers in (probabilities, np.maximum(KNOWN["normal"].sample(20_000), 0)):
        low, high = observe(make("x"), [numbers]).range(UINT8)
        assert low == 0 < high <= np.float32(numbers.max())
        qparams = range_qparams(low, high, UINT8)
        assert qparams.zero_point == 0
        np.testing.assert_allclose(observe(make("x"), [-numbers]).range(UINT8), (-high, 0), rtol=1e-6)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("name", KNOWN)
def test_percentile_is_the_quantile(name, percentile) -> None:
    """Within a bin, 1/64 octave, and the sample's own grain."""
    known, beyond = KNOWN[name], (1 - percentile / 100) / 2
    own = observe(Percentile("x", percentile=percentile), np.array_split(known.sample(COUNT), 4))
    exact = known.quantile(np.array([beyond, 1 - beyond]))
    np.testing.assert_allclose(own.range(UINT8), exact, rtol=0.03)
    np.testing.assert_allclose(own.range(INT8_SYM), exact, rtol=0.03)


def test_percentile_of_magnitudes_and_of_sides() -> None:
    """90 % of 1 … 2, 10 % of -8 … -4: a symmetric grid sees one set of magnitudes."""
    numbers = np.concatenate([np.linspace(1, 2, 9000), np.linspace(-8, -4, 1000)])
    own = observe(Percentile("x", percentile=95), [numbers])
    np.testing.assert_allclose(own.range(UINT8), np.quantile(numbers, [0.025, 0.975]), rtol=0.02)
    low, high = own.range(INT8_SYM)
    assert low == pytest.approx(-np.quantile(np.abs(numbers), 0.95), rel=0.02)
    assert high == 2, "no farther than the largest number"


def test_percentile_100_is_minmax() -> None:
    own = observe(Percentile("x", percentile=100), [KNOWN["t4"].sample(5000)])
    for grid in GRIDS:
        np.testing.assert_allclose(own.range(grid), (own.low, own.high), rtol=1e-6)


def _divergence(known: Known, clip: float, codes: int) -> float:
    """KL(P‖Q) of a symmetric grid by the distribution function, by definition: P has PARTS bins in each cell, what is
    beyond the end cells evenly over their bins; Q has each cell's own numbers evenly over its bins.
    """
    step = 2 * clip / (codes - 1)
    borders = (np.arange(codes * PARTS + 1) / PARTS - codes / 2) * step
    inside = np.diff(known.below(borders)).reshape(codes, PARTS)
    cells = inside.sum(axis=1)
    q = np.repeat(cells[:, None] / PARTS, PARTS, axis=1)
    p = inside.copy()
    beyond = known.below(borders[:1])[0]
    for end in (0, -1):
        p[end] *= 1 + beyond / max(cells[end], 1e-12)
    return float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0) - p + q))


@pytest.mark.parametrize(("grid", "codes"), [(INT8_SYM, 255), (UINT8, 256), (INT4_SYM, 15)], ids=["255", "256", "15"])
@pytest.mark.parametrize("name", KNOWN)
def test_entropy_is_least_by_the_distribution_function(name, grid, codes) -> None:
    """Brute force on the exact distribution. Within 3 % of the least divergence, the clip within 6 %."""
    known = KNOWN[name]
    low, high = _observed(Entropy, known).range(grid)
    clips = np.exp2(np.arange(0, 5.5, 0.05))
    found = [_divergence(known, clip, codes) for clip in clips]
    assert _divergence(known, (high - low) / 2, codes) <= 1.03 * min(found)
    np.testing.assert_allclose([-low, high], clips[np.argmin(found)], rtol=0.06)


def test_entropy_clips_a_lone_outlier_and_mse_does_not() -> None:
    numbers = np.append(KNOWN["normal"].sample(100_000), 300)
    assert observe(Entropy("x"), [numbers]).range(UINT8)[1] < 8
    assert observe(Mse("x"), [numbers]).range(UINT8)[1] > 250


def test_entropy_never_clips_most_of_it() -> None:
    """Ranges that hold nothing, or little, would fit themselves perfectly."""
    clusters = np.where(np.arange(20_000) % 2, 5, -3) + 0.1 * KNOWN["normal"].sample(20_000)
    for grid in (UINT8, INT8_SYM, UINT16, FLOAT8):
        low, high = observe(Entropy("x"), [clusters]).range(grid)
        assert (low, high) == (pytest.approx(-3.3, abs=0.3), pytest.approx(5.2, abs=0.3))


def test_exact_zeros_do_not_matter_to_entropy() -> None:
    """Half the numbers are zero: the range is that of the others, but for what one more number of a cell is worth."""
    dense = KNOWN["laplace"].sample(COUNT)
    plain = observe(Entropy("x"), [dense]).range(INT8_SYM)
    sparse = observe(Entropy("x"), [np.concatenate([dense, np.zeros(COUNT)])]).range(INT8_SYM)
    np.testing.assert_allclose(sparse, plain, rtol=0.1)


def test_the_error_of_a_bin_is_exact() -> None:
    """One bin from 0.2 to 5.3, by a fine sum; within, at and beyond the ends of the grid."""
    x = np.linspace(0.2, 5.3, 2_000_001)
    seen = Distribution(np.array([0.2, 5.3]), np.array([7.0]))
    for grid in (UINT8, INT8_SYM, FLOAT8, INT4_SYM):
        for high in (2.0, 5.3, 40.0):
            expected = np.mean((x - _quantized(x, 0.0, high, grid)) ** 2)
            own = squared_error(seen, np.zeros(1, np.float32), np.array([high], np.float32), grid)[0]
            assert own == pytest.approx(expected, rel=1e-4)
