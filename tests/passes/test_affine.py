"""passes/affine.py: exact grids, degenerate groups, round trips, and the quality the design promises."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile.passes.affine import QParams, Quantized, expand, range_qparams, storable
from qcompile.passes.spec import ActivationSpec, PerChannel, PerGroup, QuantSpec

GRIDS = {
    "sym": {"symmetric": True},
    "positive": {"symmetric": True, "signed_scale": False},
    "asym": {"symmetric": False},
}


def _gaussian(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def _round_trip(w: np.ndarray, spec: QuantSpec, importance: np.ndarray | None = None) -> Quantized:
    qparams = spec.fit(w, importance)
    return Quantized(spec.project(w, qparams), qparams, spec)


def test_symmetric_grid_puts_the_largest_value_on_minus_eight() -> None:
    w = np.array([[4.0, -4.0, 0.5], [-1.0, 1.0, -0.25]], np.float32)
    q = _round_trip(w, QuantSpec(4, PerGroup(2), symmetric=True))
    np.testing.assert_array_equal(q.qparams.scale, [[-0.5, 0.5, -0.0625]])
    np.testing.assert_array_equal(q.codes, [[-8, -8, -8], [2, 2, 4]])
    np.testing.assert_array_equal(q.dequantize(), w)


def test_positive_scales_reach_both_ends() -> None:
    w = np.array([[3.5, -4.0, 3.5], [-1.0, 2.0, -4.0]], np.float32)
    q = _round_trip(w, QuantSpec(4, PerGroup(2), symmetric=True, signed_scale=False))
    np.testing.assert_array_equal(q.qparams.scale, [[0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(q.codes, [[7, -8, 7], [-2, 4, -8]])


def test_asymmetric_grid_spans_the_range_with_an_exact_zero() -> None:
    w = np.array([[-1.0, 2.0, -3.75], [2.75, 3.75, -2.0], [0.0, 0.0, 0.0]], np.float32)
    q = _round_trip(w, QuantSpec(4, PerGroup(3)))
    np.testing.assert_array_equal(q.qparams.scale, [[0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(q.qparams.zero_point, [[4, 0, 15]])
    np.testing.assert_array_equal(q.codes, [[0, 8, 0], [15, 15, 7], [4, 0, 15]])
    np.testing.assert_array_equal(q.dequantize(), w)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "size"), [(576, 128), (5, 4)])
def test_a_partial_last_group_is_a_group_of_its_own(k, size, bits, grid) -> None:
    w, spec = _gaussian(k, 3), QuantSpec(bits, PerGroup(size), **GRIDS[grid])
    whole = _round_trip(w, spec)
    assert whole.qparams.scale.shape == whole.qparams.zero_point.shape == (-(-k // size), 3)
    for group in range(-(-k // size)):
        rows = slice(group * size, (group + 1) * size)
        alone = _round_trip(w[rows], QuantSpec(bits, PerChannel(1), **GRIDS[grid]))
        np.testing.assert_array_equal(whole.codes[rows], alone.codes)
        np.testing.assert_array_equal(whole.dequantize()[rows], alone.dequantize())


@pytest.mark.parametrize("importance", [None, "ones", "zeros"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_and_constant_groups(bits, grid, importance) -> None:
    """Zeros decode to zeros, powers of two to themselves where the grid has them, others nearly."""
    constants = np.array([0.0, 1.0, -2.0, 0.3, -1e-7, 1e4], np.float32)
    w = np.repeat(constants[None], 6, axis=0)
    weights = {None: None, "ones": np.ones(6, np.float32), "zeros": np.zeros(6, np.float32)}[importance]
    q = _round_trip(w, QuantSpec(bits, PerGroup(4), **GRIDS[grid]), weights)
    assert np.isfinite(q.qparams.scale).all()
    assert (q.qparams.scale != 0).all()
    np.testing.assert_allclose(q.dequantize(), w, rtol=2**-11, atol=0)
    if grid == "sym":
        np.testing.assert_array_equal(q.dequantize()[:, :3], w[:, :3])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_codes_belong_to_the_scale_that_is_stored(grid, dtype) -> None:
    w, spec = _gaussian(32, 64), QuantSpec(8, PerGroup(32), scale_dtype=dtype, **GRIDS[grid])
    exact = QuantSpec(8, PerGroup(32), scale_dtype=np.float64, **GRIDS[grid]).fit(w)
    q = _round_trip(w, spec)
    scale = q.qparams.scale
    stored = np.float16 if dtype is np.float32 else dtype  # kernels keep two bytes of float32 models' scales, too
    np.testing.assert_array_equal(scale, scale.astype(stored).astype(np.float32))
    levels = q.codes.astype(np.float64) - q.qparams.zero_point
    nearest = np.clip(np.rint(w / scale) + q.qparams.zero_point, spec.qmin, spec.qmax) - q.qparams.zero_point
    np.testing.assert_array_equal(levels, nearest)
    assert (spec.project(w, exact) != q.codes).any(), "rounding the scale afterwards would give other codes"


def test_float32_scales_where_float16_is_too_coarse_stay_as_they_are() -> None:
    scale = np.array([[2**-16, 65504, 0.3], [1.5e-5, 7e4, -0.3]], np.float32)
    kept = storable(scale, np.float32)
    np.testing.assert_array_equal(kept[0, :2], scale[0, :2])
    np.testing.assert_array_equal(kept[1, :2], scale[1, :2])
    np.testing.assert_array_equal(kept[:, 2], scale[:, 2].astype(np.float16))


def test_scales_too_small_for_half_precision_do_not_become_zero() -> None:
    w = np.full((4, 2), 1e-9, np.float32)
    q = _round_trip(w, QuantSpec(4, PerGroup(4), scale_dtype=np.float16))
    assert (q.qparams.scale != 0).all()
    np.testing.assert_allclose(q.dequantize(), w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("importance", [False, True])
def test_positive_scales_where_they_are_demanded(importance) -> None:
    w, weights = _gaussian(70, 50), np.exp(_gaussian(70, 1)[:, 0]) if importance else None
    for grid, positive in (("positive", True), ("asym", True), ("sym", False)):
        scale = QuantSpec(4, PerGroup(32), **GRIDS[grid]).fit(w, weights).scale
        assert (scale > 0).all() == positive


weight_arrays = st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(-6, 4))


@settings(max_examples=60, deadline=None)
@given(weight_arrays, st.integers(1, 20), st.sampled_from([4, 8]), st.sampled_from(sorted(GRIDS)))
@example((5, 2, 0, 0), 4, 4, "sym")
def test_round_trip_is_within_half_a_step(shape, size, bits, grid) -> None:
    k, n, seed, exponent = shape
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((k, n)) * 10.0**exponent + rng.integers(-1, 2)).astype(np.float32)
    spec = QuantSpec(bits, PerGroup(size), **GRIDS[grid])
    q = _round_trip(w, spec)
    assert q.codes.dtype == spec.code_dtype
    assert q.codes.min() >= spec.qmin
    assert q.codes.max() <= spec.qmax
    step = expand(q.qparams.scale, spec, k).astype(np.float64)
    zero = expand(q.qparams.zero_point, spec, k)
    ends = np.stack([(spec.qmin - zero) * step, (spec.qmax - zero) * step])
    clipped = np.clip(w, ends.min(axis=0), ends.max(axis=0))
    error = np.abs(clipped - q.dequantize())
    assert (error <= np.abs(step) * (0.5 + 2e-5)).all()
    # Only the short end of a signed grid, or an asymmetric one whose zero point was rounded, may cut values off,
    # and the rounding of the scale to float16, by 2^-9 of the range at most.
    cut = (1.0 if spec.symmetric else 0.5) + (spec.qmax - spec.qmin) * 2**-9
    assert (np.abs(w - clipped) <= np.abs(step) * (1 + 2e-5) * cut).all()
    again = spec.project(q.dequantize(), q.qparams)
    np.testing.assert_array_equal(again, q.codes)


@settings(max_examples=40, deadline=None)
@given(weight_arrays, st.integers(1, 20), st.sampled_from(sorted(GRIDS)), st.sampled_from([np.float32, np.float16]))
def test_importance_never_loses_to_the_plain_range(shape, size, grid, dtype) -> None:
    k, n, seed, _ = shape
    rng = np.random.default_rng(seed)
    w, weights = rng.standard_normal((k, n)).astype(np.float32), rng.exponential(1.0, k).astype(np.float32)
    spec = QuantSpec(4, PerGroup(size), scale_dtype=dtype, **GRIDS[grid])

    def errors(q: Quantized) -> np.ndarray:
        square = (q.dequantize().astype(np.float64) - w) ** 2 * weights[:, None]
        return np.add.reduceat(square, np.arange(0, k, size), axis=0)

    plain, searched = errors(_round_trip(w, spec)), errors(_round_trip(w, spec, weights))
    assert (searched <= plain * (1 + 1e-4) + 1e-10).all()


# DESIGN §2. The last row is the search with equal importances.
@pytest.mark.parametrize(
    ("grid", "search", "g32", "g128"),
    [("sym", False, 21.3, 19.7), ("asym", False, 21.9, 20.0), ("asym", True, 22.3, 20.4)],
)
def test_signal_to_noise_on_gaussian_weights(grid, search, g32, g128) -> None:
    w = _gaussian(1024, 256)
    for size, wanted in ((32, g32), (128, g128)):
        q = _round_trip(w, QuantSpec(4, PerGroup(size), **GRIDS[grid]), np.ones(1024, np.float32) if search else None)
        decibels = 10 * np.log10(np.square(w).sum() / np.square(w - q.dequantize()).sum())
        assert decibels == pytest.approx(wanted, abs=0.2)


def test_signed_scales_beat_positive_ones() -> None:
    w = _gaussian(512, 64)
    signed, positive = (_round_trip(w, QuantSpec(4, PerGroup(32), **GRIDS[grid])) for grid in ("sym", "positive"))
    assert np.square(signed.dequantize() - w).sum() < 0.9 * np.square(positive.dequantize() - w).sum()


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    qparams = QParams(np.array([[0.5], [2.0]], np.float32), np.array([[3.0], [15.0]], np.float32))
    codes = np.array([[0], [15], [0], [15]], np.uint8)
    values = QuantSpec(4, PerGroup(2)).decode(codes, qparams)
    np.testing.assert_array_equal(values, [[-1.5], [6.0], [-30.0], [0.0]])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2).map(sorted),
    st.sampled_from([ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16]),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
)
@example([-1.0, 3.0], ir.DataType.INT8, False, np.float32)
def test_an_activation_grid_spans_its_range_and_no_more(ends, dtype, symmetric, scale_dtype) -> None:
    """Zero is a code; both ends are within half a step of one; the grid is not wider than it must be."""
    spec = ActivationSpec(dtype, symmetric=symmetric)
    low, high = (np.float32(end) for end in ends)
    found = range_qparams(np.asarray(low), np.asarray(high), spec, scale_dtype=scale_dtype)
    scale, zero = float(found.scale), float(found.zero_point)
    assert zero == round(zero)
    assert spec.qmin <= zero <= spec.qmax
    first, last = (scale * (code - zero) for code in (spec.qmin, spec.qmax))
    slack = (0.5 + 1e-3) * scale
    assert first - slack <= low
    assert high <= last + slack
    width = 2 * max(-low, high, 0) if symmetric else max(high, 0) - min(low, 0)
    if width > 1e-2:  # float16 scales of narrower ones are no normal numbers
        assert last - first <= float(width) * (1 + 2**-9 + 1 / spec.qmax * symmetric)
