"""Error-compensated rounding: against a plain reference, as a local minimum, and on Gram matrices that are none."""

import copy
import itertools

import numpy as np
import pytest

from qcompile.passes.affine import QParams, Quantized
from qcompile.passes.algebra import Compensation
from qcompile.passes.gptq import ErrorCompensated, _compensate, _Descending, default_damping
from qcompile.passes.rotation import Rotation
from qcompile.passes.rounding import column_errors, round_to_nearest, round_with_clip
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics

GRIDS = {
    "sym": {"symmetric": True},
    "positive": {"symmetric": True, "signed_scale": False},
    "asym": {"symmetric": False},
}


def _problem(k: int, n: int, *, rows: int = 400, seed: int = 0) -> tuple[np.ndarray, Statistics]:
    """Weights (k, n), and statistics of correlated channels of very different energy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) @ (np.eye(k) + 0.5 * rng.standard_normal((k, k))) * rng.lognormal(0, 0.7, k)
    return rng.standard_t(5, (k, n)).astype(np.float32), _statistics(x)


def _statistics(x: np.ndarray) -> Statistics:
    x = x.astype(np.float32)
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))


def _raised(gram: np.ndarray, damping: float) -> np.ndarray:
    """The Gram matrix with `damping` of each channel's energy added to its diagonal."""
    return gram + np.diag(np.float32(damping) * np.diagonal(gram))


def _nearest(w: np.ndarray, spec: QuantSpec) -> Quantized:
    return round_to_nearest(w, spec, None)


def _errors(q: Quantized, w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """‖X D‖² of each column in float64."""
    return column_errors(q.dequantize().astype(np.float64) - w, gram.astype(np.float64))


def _swept(w: np.ndarray, gram: np.ndarray, qparams: QParams, spec: QuantSpec) -> Quantized:
    """The codes of the sweep."""
    return _compensate(w, Compensation.of(gram, np.zeros(len(gram), np.float32)), qparams, spec)[0]


def _rounds(
    w: np.ndarray, gram: np.ndarray, q: Quantized, count: int = 1, *, codes: bool = True, scales: bool = False
) -> list[Quantized]:
    """What rounds of coordinate descent leave, one after the other."""
    own, found = _Descending(gram, np.zeros(len(gram), np.float32), w, q), []
    for number in range(count):
        own.round(forward=number % 2 == 0, codes=codes, scales=scales)
        found.append(copy.deepcopy(own.moving.result()))
    return found


def _textbook(w: np.ndarray, gram: np.ndarray, qparams: QParams, spec: QuantSpec) -> np.ndarray:
    """Frantar et al. 2022, one row at a time in float64, the inverse Hessian updated after each: codes (K, N)."""
    k, size = w.shape[0], spec.group_size(w.shape[0])
    work, inverse = w.astype(np.float64), np.linalg.inv(gram.astype(np.float64))
    codes = np.zeros(w.shape)
    for row in sorted(range(k), key=lambda r: -gram[r, r]):
        scale, zero = (p[row // size].astype(np.float64) for p in (qparams.scale, qparams.zero_point))
        codes[row] = np.clip(np.rint(work[row] / scale) + zero, spec.qmin, spec.qmax)
        error = (work[row] - (codes[row] - zero) * scale) / inverse[row, row]
        work -= np.outer(inverse[:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    return codes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("k", "size"), [(1, 4), (7, 4), (40, 16), (150, 64)])
def test_the_sweep_is_the_textbook_s(k, size, grid) -> None:
    """150 rows are more than one lazy block of 128; act-order leaves the codes in natural order."""
    w, statistics = _problem(k, 6, seed=k)
    spec, gram = QuantSpec(4, PerGroup(size), **GRIDS[grid]), _raised(statistics.gram, 0.01)
    qparams = spec.fit(w)
    np.testing.assert_array_equal(_swept(w, gram, qparams, spec).codes, _textbook(w, gram, qparams, spec))


def test_uncorrelated_channels_need_no_compensation() -> None:
    w, _ = _problem(20, 5)
    spec = QuantSpec(4, PerGroup(8))
    gram = np.diag(np.linspace(3, 1, 20)).astype(np.float32)
    q = _nearest(w, spec)
    np.testing.assert_array_equal(_swept(w, gram, q.qparams, spec).codes, q.codes)


@pytest.mark.parametrize("grid", GRIDS)
def test_descent_ends_where_no_single_code_lowers_the_error(grid) -> None:
    """Every code of three rows is tried with the others fixed; 300 columns, started from plain rounding."""
    w, statistics = _problem(3, 300, seed=1)
    spec, gram = QuantSpec(4, PerGroup(2), **GRIDS[grid]), statistics.gram
    q = _nearest(w, spec)
    moved = 0
    for following in _rounds(w, gram, q, 20):
        moved += int((following.codes != q.codes).sum())
        q = following
    assert moved > 20, "plain rounding is no minimum here"
    reached = _errors(q, w, gram)
    for row, code in itertools.product(range(3), range(spec.qmin, spec.qmax + 1)):
        codes = q.codes.copy()
        codes[row] = code
        other = _errors(Quantized(codes, q.qparams, spec), w, gram)
        assert (other >= reached * (1 - 1e-4) - 1e-6 * gram.max()).all()


@pytest.mark.parametrize("size", [16, 64, 200, 400])
@pytest.mark.parametrize("scales", [False, True])
def test_descent_works_across_blocks(size: int, scales: bool) -> None:
    """The error of no column rises in any round, to and fro over blocks of several groups or of one: what blocks know
    of each other is what a whole product would say.
    """
    w, statistics = _problem(400, 8, rows=800)
    gram, q = statistics.gram, _nearest(w, QuantSpec(4, PerGroup(size)))
    first = _errors(q, w, gram)
    for following in _rounds(w, gram, q, 5, scales=scales):
        assert (_errors(following, w, gram) <= _errors(q, w, gram) * (1 + 1e-5)).all()
        q = following
    assert _errors(q, w, gram).sum() < 0.7 * first.sum()
    own = _Descending(gram, np.zeros(400, np.float32), w, q)
    for number in range(3):
        own.round(forward=number % 2 == 0, codes=True, scales=scales)
        met = [(slice(0, b.start) if number % 2 == 0 else slice(b.stop, None)) for b in own.blocks]
        np.testing.assert_allclose(own.left, w - own.moving.result().dequantize(), atol=1e-5)
        for rows, others in zip(own.blocks, met, strict=True):
            wanted = gram[rows, others] @ own.left[others]
            np.testing.assert_allclose(own.outside[rows], wanted, atol=1e-5 * np.abs(gram @ w).max())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [32, 96])
def test_refit_ends_in_the_least_squares_solution(size, grid) -> None:
    """Scales one by one, until all are the best together that the file can hold."""
    w, statistics = _problem(96, 10)
    spec, gram = QuantSpec(4, PerGroup(size), **GRIDS[grid]), statistics.gram
    q = _nearest(w, spec)
    refit = _rounds(w, gram, q, 60, codes=False, scales=True)[-1]
    np.testing.assert_array_equal(refit.codes, q.codes)
    assert (_errors(refit, w, gram) <= _errors(q, w, gram) * (1 + 1e-4)).all()
    assert _errors(refit, w, gram).sum() < 0.99 * _errors(q, w, gram).sum()
    factor = np.linalg.cholesky(gram.astype(np.float64)).T
    levels = q.codes.astype(np.float64) - np.repeat(q.qparams.zero_point, size, axis=0)
    for column in range(3):
        groups = [factor[:, i : i + size] @ levels[i : i + size, column] for i in range(0, 96, size)]
        wanted = np.linalg.lstsq(np.stack(groups, axis=1), factor @ w[:, column], rcond=None)[0]
        np.testing.assert_allclose(refit.qparams.scale[:, column], wanted, rtol=5e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_refit_turns_a_scale_round_only_where_it_may(grid) -> None:
    """Least squares would give the second group the scale -1."""
    spec, levels = QuantSpec(4, PerGroup(1), **GRIDS[grid]), np.array([[1.0], [-1.0]], np.float32)
    zero = np.full((2, 1), 0 if spec.symmetric else 4, np.float32)
    q = Quantized((levels + zero).astype(spec.code_dtype), QParams(np.full((2, 1), 0.5, np.float32), zero), spec)
    (refit,) = _rounds(np.ones((2, 1), np.float32), np.eye(2, dtype=np.float32), q, codes=False, scales=True)
    np.testing.assert_allclose(refit.qparams.scale[:, 0], [1, -1 if grid == "sym" else 0.5], rtol=2e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(40), PerChannel(1)], ids=str)
def test_compensated_beats_clipped_beats_plain(granularity, grid) -> None:
    w, statistics = _problem(96, 20, seed=2)
    spec = QuantSpec(4, granularity, **GRIDS[grid])
    little = 0.01  # the errors are those on the very rows of the statistics
    compensating = ErrorCompensated(little, sweeps=0, refit=False), ErrorCompensated(little)
    roundings = (round_to_nearest, round_with_clip, *compensating)
    found = [rounding(w, spec, statistics) for rounding in roundings]
    plain, clipped, compensated, refined = (_errors(q, w, statistics.gram) for q in found)
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert compensated.sum() < 0.8 * clipped.sum()
    damped = statistics.gram + np.diag(statistics.compensation(little).damped[1])  # that error rises in no column
    assert (_errors(found[3], w, damped) <= _errors(found[2], w, damped) * (1 + 1e-5)).all()
    assert refined.sum() < 0.95 * compensated.sum()
    assert found[-1].codes.dtype == spec.code_dtype
    if grid == "positive":
        assert (found[-1].qparams.scale > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_columns_do_not_affect_each_other(dtype) -> None:
    w, statistics = _problem(140, 9)
    spec, rounding = QuantSpec(4, PerGroup(64), scale_dtype=dtype), ErrorCompensated()
    joint = rounding(w, spec, statistics)
    for part in (slice(0, 1), slice(1, 5), slice(5, 9)):
        alone = rounding(w[:, part], spec, statistics)
        np.testing.assert_array_equal(alone.codes, joint.codes[:, part])
        np.testing.assert_allclose(alone.qparams.scale, joint.qparams.scale[:, part], rtol=1e-6)


def test_more_damping_means_less_compensation() -> None:
    w, statistics = _problem(48, 12)
    spec = QuantSpec(4, PerGroup(16))
    gram = _raised(statistics.gram, 1e6)
    qparams = spec.fit(w)
    np.testing.assert_array_equal(_swept(w, gram, qparams, spec).codes, spec.project(w, qparams))


def test_statistics_are_demanded() -> None:
    with pytest.raises(TypeError, match="needs statistics"):
        ErrorCompensated()(np.ones((4, 4), np.float32), QuantSpec(4, PerGroup(4)), None)


@pytest.mark.parametrize("rows", [96, 192])
def test_few_rows_are_damped_more(rows: int) -> None:
    """On unseen rows, where a damping of 0.01 would fit the calibration rows and do worse than rounding with clip."""
    k, spec = 96, QuantSpec(4, PerGroup(32))
    w, _ = _problem(k, 24)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows + 4000, k)) @ (np.eye(k) + 0.05 * rng.standard_normal((k, k)))
    few, unseen = _statistics(x[:rows]), _statistics(x[rows:])
    chosen, little = (_errors(ErrorCompensated(d)(w, spec, few), w, unseen.gram).sum() for d in (None, 0.01))
    clipped = _errors(round_with_clip(w, spec, few), w, unseen.gram).sum()
    assert chosen < 0.95 * little
    assert clipped < little
    assert chosen < 1.1 * clipped
    assert default_damping(k, rows) == pytest.approx(0.01 + 0.5 * k / rows)


@pytest.mark.parametrize("rows", [1, 6, 40, 2000])
@pytest.mark.parametrize(
    ("by", "refined"),
    [("nothing", False), ("channel", False), ("column", False), ("nothing", True), ("channel", True)],
)
def test_it_tells_the_errors_that_a_product_tells(rows: int, by: str, refined: bool) -> None:
    """Of few rows, too, whose damping is most of what the sweep is left with, and of rows that are all alike."""
    (w, statistics), rng = _problem(48, 9, rows=rows), np.random.default_rng(1)
    spec = QuantSpec(4, PerGroup(16))
    shape = {"nothing": (1, 1), "channel": (48, 1), "column": (48, 9)}[by]
    factor = np.ones(shape, np.float32) if by == "nothing" else rng.uniform(0.3, 3, shape).astype(np.float32)
    known = statistics if by == "nothing" else statistics.rescaled(factor.squeeze())
    rounding = ErrorCompensated() if refined else ErrorCompensated(sweeps=0, refit=False)
    values, errors = rounding.told(w * factor, spec, known)
    np.testing.assert_array_equal(values, rounding(w * factor, spec, known).dequantize())
    delta = ((values - w * factor) / factor).astype(np.float64)
    np.testing.assert_allclose(errors, column_errors(delta, statistics.gram.astype(np.float64)), rtol=2e-3)


def test_it_tells_the_errors_of_turned_rows_and_of_a_matrix_that_had_to_be_raised() -> None:
    w, statistics = _problem(64, 9, rows=300)
    spec, rounding = QuantSpec(4, PerGroup(16)), ErrorCompensated(sweeps=0, refit=False)
    turned = statistics.rotated(Rotation.of(64, 0))
    values, errors = rounding.told(w, spec, turned)
    np.testing.assert_allclose(errors, column_errors(values - w, turned.gram), rtol=2e-3)
    sums = statistics.gram - 0.3 * np.diag(np.diagonal(statistics.gram))  # indefinite, as sums in float32 may be
    assert np.linalg.eigvalsh(sums)[0] < 0
    raised = Compensation.of(sums, np.zeros(64, np.float32))
    swept, spread = _compensate(w, raised, spec.fit(w, raised.diagonal), spec)
    delta = swept.dequantize() - w
    np.testing.assert_allclose(
        np.square(spread).sum(axis=0) - raised.damping(delta), column_errors(delta, sums), rtol=0.02
    )
