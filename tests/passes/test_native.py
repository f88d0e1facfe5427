"""The loops in C++ against the clear forms that they stand for, which an installation without them has alone."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import native_library

from qcompile.passes import native
from qcompile.passes.affine import Grid, QParams, Quantized, expand
from qcompile.passes.algebra import Compensation
from qcompile.passes.formats import FORMATS
from qcompile.passes.formats.iq4_nl import IQ4NL
from qcompile.passes.formats.mxfp4 import MXFP4, MicroGrid
from qcompile.passes.formats.nf4 import NF4
from qcompile.passes.formats.nvfp4 import NVFP4, FloatScaledGrid
from qcompile.passes.formats.tables import TableGrid
from qcompile.passes.gptq import ErrorCompensated, _compensate, _Descending
from qcompile.passes.native import RUN, Loops, widened
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics

INTEGERS = st.builds(
    lambda bits, size, symmetric, signed, half: QuantSpec(
        bits, PerGroup(size) if size else PerChannel(1), symmetric, signed, np.float16 if half else np.float32
    ),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([0, 1, 8, 32, 300]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def _table(name: str, target: str, size: int, exponent: int, half: bool) -> TableGrid:
    own = next(own for own in (*FORMATS, IQ4NL()) if own.name == name).grid(target)
    assert isinstance(own, TableGrid)
    own = own.typed(np.float16 if half else np.float32)
    if isinstance(own, FloatScaledGrid):
        return replace(own, exponent=max(exponent, -15) if half else exponent)
    return own if isinstance(own, MicroGrid) else replace(own, granularity=PerGroup(size) if size else PerChannel(1))


TABLES = st.builds(
    _table,
    st.sampled_from(["nf4", "fp4", "mxfp4", "nvfp4", "iq4_nl"]),
    st.sampled_from(["qcompile", "matmulnbits"]),
    st.sampled_from([0, 1, 8, 32, 300]),
    st.integers(-30, 1),
    st.booleans(),
) | st.just(TableGrid("three", (0.0, 1.0, -1.0), PerGroup(16)))
GRIDS = INTEGERS | TABLES


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    native_library()


@contextmanager
def clear_form() -> Iterator[None]:
    """An installation without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda: None)
        yield


def _weights(seed: int, k: int, n: int) -> np.ndarray:
    """Heavy-tailed columns of very different sizes, some with zeros or with one sign."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(3, (k, n)) * 10.0 ** rng.uniform(-9, 4, n)).astype(np.float32)
    w[: k // 2, ::5] = 0
    w[:, 1::5] = np.abs(w[:, 1::5])
    return w


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 400), st.integers(2, 40), st.booleans())
def test_fit_gives_the_very_numbers(spec: Grid, seed: int, k: int, n: int, each: bool) -> None:
    """Of several columns: of one alone numpy adds several rows at once."""
    w = _weights(seed, k, n)
    importance = np.random.default_rng(seed).lognormal(0, 2, (k, n) if each else k).astype(np.float32)
    importance[::7] = 0
    found = spec.fit(w, importance)
    with clear_form(), np.errstate(all="ignore"):
        wanted = spec.fit(w, importance)
    np.testing.assert_array_equal(found.scale, wanted.scale)
    np.testing.assert_array_equal(found.zero_point, wanted.zero_point)


@settings(max_examples=60, deadline=None)
@given(
    GRIDS,
    st.integers(0, 99),
    st.integers(1, 400),
    st.integers(1, 150),
    st.sampled_from(["row", "column", "half", "double"]),
)
def test_plain_rounding_gives_the_very_codes(spec: Grid, seed: int, k: int, n: int, kind: str) -> None:
    w = _weights(seed, k, n)
    if kind == "half":
        w = np.clip(w, -60000, 60000).astype(np.float16)
    w = np.asfortranarray(w) if kind == "column" else w.astype(np.float64) if kind == "double" else w
    found = round_to_nearest(w, spec, None)
    with clear_form():
        wanted = round_to_nearest(w, spec, None)
    assert found.codes.dtype == wanted.codes.dtype
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.qparams.scale, wanted.qparams.scale)
    np.testing.assert_array_equal(found.qparams.zero_point, wanted.qparams.zero_point)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 400), st.integers(1, 40))
def test_project_gives_the_very_codes(spec: Grid, seed: int, k: int, n: int) -> None:
    """Of ties, too: half of the numbers lie in the middle of two levels, on scales that divide them exactly."""
    w, rng = _weights(seed, k, n), np.random.default_rng(seed)
    qparams = spec.fit(w)
    qparams = replace(qparams, scale=np.exp2(np.round(np.log2(np.abs(qparams.scale)))).astype(np.float32))
    middles = spec.looked_up.middles if spec.looked_up is not None else np.arange(-20, 20) + 0.5
    ties = rng.choice(middles, (k, n)) * expand(qparams.scale, spec, k)
    w = np.where(rng.random((k, n)) < 0.5, ties, w).astype(np.float32)
    found = spec.project(w, qparams)
    with clear_form():
        wanted = spec.project(w, qparams)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


@settings(deadline=None, max_examples=60)
@given(spec=GRIDS, seed=st.integers(0, 99), k=st.integers(1, 300), n=st.integers(1, 70), part=st.booleans())
def test_codes_stand_for_the_very_numbers(spec: Grid, seed: int, k: int, n: int, part: bool) -> None:
    """Of some of the columns, too, whose rows lie apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_LEAST", 0)
        q = round_to_nearest(_weights(seed, k, n), spec, None)
        q = q.columns(slice(n // 3, n - n // 4)) if part else q
        found = q.dequantize()
        with clear_form():
            wanted = q.dequantize()
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_half_precision_becomes_the_very_numbers_however_it_lies() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(128, 512)
    for w in (every, every.T, every[:, 3:40], every[::-2], every[:, ::3], every[:1], every[:, :1], every[:0]):
        np.testing.assert_array_equal(widened(w), w.astype(np.float32))
    assert widened(wide := np.ones((2, 3), np.float32)) is wide
    assert widened(np.ones((2, 3))).dtype == np.float32


@pytest.mark.parametrize("table", [MXFP4().grid("qcompile"), NVFP4().grid("qcompile")])
def test_scales_are_stored_as_the_grid_says(table: TableGrid) -> None:
    """Across all magnitudes of a weight, ends of what a byte holds and ties of its numbers among them."""
    rng = np.random.default_rng(0)
    w = np.ldexp(
        rng.choice([1, 1.0625, 1.1875, 1.25, 4 / 3, 1.5, 1.999], (1, 4000)), rng.integers(-126, 126, (1, 4000))
    )
    for dtype in (np.float32, np.float16):
        spec = table.typed(dtype)
        found = round_to_nearest(w.astype(np.float32), spec, None)
        with clear_form(), np.errstate(over="ignore"):
            wanted = round_to_nearest(w.astype(np.float32), spec, None)
        np.testing.assert_array_equal(found.qparams.scale, wanted.qparams.scale)
        np.testing.assert_array_equal(found.codes, wanted.codes)


def test_every_half_precision_number_is_read_as_it_is() -> None:
    """Each in a column of its own, which its scale alone tells: at 8 bits, with the file's own precision."""
    w = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[None]
    w = w[:, np.isfinite(w[0])]
    spec = QuantSpec(8, PerGroup(1), symmetric=True, scale_dtype=np.float32)
    found = round_to_nearest(w, spec, None)
    with clear_form():
        wanted = round_to_nearest(w.astype(np.float32), spec, None)
    np.testing.assert_array_equal(found.qparams.scale, wanted.qparams.scale)
    np.testing.assert_array_equal(found.codes, wanted.codes)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_lost(fault: float, dtype: type) -> None:
    """No number of its group decodes to a finite one, whatever rows come behind it; all others are as they were."""
    w, spec = np.random.default_rng(0).standard_normal((96, 70)).astype(dtype), QuantSpec(4, PerGroup(32))
    wanted, lost = round_to_nearest(w, spec, None).dequantize(), np.zeros(w.shape, bool)
    w[[0, 40], [3, 69]], lost[:32, 3], lost[32:64, 69] = fault, True, True
    for form in (nullcontext(), clear_form()):
        with form, np.errstate(all="ignore"):
            found = round_to_nearest(w, spec, None).dequantize()
            fitted = spec.fit(w.astype(np.float32), np.ones(len(w), np.float32))
        np.testing.assert_array_equal(np.isfinite(found), ~lost)
        np.testing.assert_array_equal(found[~lost], wanted[~lost])
        np.testing.assert_array_equal(np.isfinite(fitted.scale), ~lost[::32])


def test_fit_reads_a_weight_however_it_lies() -> None:
    spec, w, importance = QuantSpec(4, PerGroup(32)), _weights(1, 96, 20), np.ones(96, np.float32)
    wanted = spec.fit(w, importance).scale
    for other in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(spec.fit(other, importance).scale, wanted)


@pytest.mark.parametrize(("k", "n"), [(4, 0)])
def test_an_empty_weight_has_no_ranges(k: int, n: int) -> None:
    assert QuantSpec(4, PerGroup(2)).fit(np.zeros((k, n), np.float32), np.ones(k, np.float32)).scale.shape == (
        -(-k // 2),
        n,
    )


def _problem(seed: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (k, n) and the Gram matrix of correlated channels of very different energy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * k + 8, k)) @ (np.eye(k) + 0.3 * rng.standard_normal((k, k))) * rng.lognormal(0, 0.7, k)
    return rng.standard_t(5, (k, n)).astype(np.float32), np.asarray(x.T @ x, np.float32)


def _losses(q: Quantized, w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    delta = q.dequantize().astype(np.float64) - w
    return np.einsum("kn,kn->n", delta, gram.astype(np.float64) @ delta)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 200), st.integers(1, 40))
def test_the_sweep_rounds_as_row_by_row(spec: Grid, seed: int, k: int, n: int) -> None:
    """Sums are in another order: a value that lies between two codes may go to the other one, and others follow."""
    w, gram = _problem(seed, k, n)
    by, qparams = Compensation.of(gram, 0.01 * np.diagonal(gram)), spec.fit(w)
    found, left = _compensate(w, by, qparams, spec)
    with clear_form():
        wanted, other = _compensate(w, by, qparams, spec)
    assert found.codes.dtype == wanted.codes.dtype
    alike = (found.codes == wanted.codes).all(axis=0)
    assert alike.mean() >= 0.9 or (~alike).sum() <= 2
    np.testing.assert_allclose(left[:, alike], other[:, alike], rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_the_sweep_follows_factors_of_each_column() -> None:
    w, gram = _problem(3, 70, 12)
    spec, factor = QuantSpec(4, PerGroup(32)), np.random.default_rng(0).uniform(0.5, 2, (70, 12)).astype(np.float32)
    by = Compensation.of(gram, 0.01 * np.diagonal(gram)).rescaled(factor)
    found, _ = _compensate(w, by, spec.fit(w), spec)
    with clear_form():
        wanted, _ = _compensate(w, by, spec.fit(w), spec)
    np.testing.assert_array_equal(found.codes, wanted.codes)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 300), st.integers(1, 40), st.booleans(), st.booleans())
def test_descent_ends_as_row_by_row(spec: Grid, seed: int, k: int, n: int, codes: bool, scales: bool) -> None:
    w, gram = _problem(seed, k, n)
    q, added = Quantized(spec.project(w, spec.fit(w)), spec.fit(w), spec), 0.01 * np.diagonal(gram)

    def rounds() -> Quantized:
        own = _Descending(gram, added, w, q)
        for number in range(3):
            own.round(forward=number % 2 == 0, codes=codes, scales=scales)
        np.testing.assert_allclose(own.left, w - own.moving.result().dequantize(), atol=1e-4 * np.abs(w).max())
        return own.moving.result()

    found = rounds()
    with clear_form():
        wanted = rounds()
    assert found.codes.dtype == wanted.codes.dtype
    damped = gram + np.diag(added)
    np.testing.assert_allclose(_losses(found, w, damped).sum(), _losses(wanted, w, damped).sum(), rtol=2e-2)
    same = (found.codes == wanted.codes).all(axis=0) & (found.qparams.scale == wanted.qparams.scale).all(axis=0)
    assert same.mean() >= 0.8 or (~same).sum() <= 2
    if spec.positive:
        assert (found.qparams.scale > 0).all()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, PerGroup(32)),
        QuantSpec(4, PerChannel(1)),
        *(own.grid("qcompile") for own in (NF4(), MXFP4(), NVFP4())),
    ],
    ids=str,
)
def test_error_compensation_gains_the_same(spec: Grid) -> None:
    w, gram = _problem(5, 256, 64)
    spec = spec.ranged(lambda: float(np.abs(w).max()))
    statistics = Statistics(600, gram, np.ones(256, np.float32))
    found = ErrorCompensated()(w, spec, statistics)
    with clear_form():
        wanted = ErrorCompensated()(w, spec, statistics)
    np.testing.assert_allclose(_losses(found, w, gram).sum(), _losses(wanted, w, gram).sum(), rtol=5e-3)


def test_other_grids_have_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    import ml_dtypes

    spec = QuantSpec(4, PerGroup(32))
    assert Loops.of(spec) is not None
    assert Loops.of(spec.typed(ml_dtypes.bfloat16)) is None, "scales are stored in a type that they do not know"
    for own in FORMATS:
        assert (Loops.of(own.grid("qcompile")) is None) == (own.grid("qcompile").rows_per_code > 1), own.name
    monkeypatch.setattr(native, "_library", functools.cache(lambda: None))
    assert Loops.of(spec) is None


@dataclass(frozen=True)
class _Powers(TableGrid):
    """A table's grid of somebody else, who says nothing of loops."""

    def storable(self, scale: np.ndarray) -> np.ndarray:
        return np.where(scale == 0, 1, np.exp2(np.ceil(np.log2(np.maximum(scale, 1e-30))))).astype(np.float32)


def test_a_subclass_that_says_nothing_of_loops_has_its_own_scales() -> None:
    spec, w = _Powers("powers", (-1.0, 0.0, 1.0), PerGroup(16)), _weights(0, 64, 20)
    for scale in (round_to_nearest(w, spec, None).qparams.scale, spec.fit(w, np.ones(64, np.float32)).scale):
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)


def test_several_codes_of_one_level_stand_for_it() -> None:
    spec = TableGrid("twice", (-1.0, 0.5, 0.5, 1.0), PerGroup(16))
    codes, ones = np.full((128, 64), 2, np.uint8), np.ones((8, 64), np.float32)
    np.testing.assert_array_equal(spec.decode(codes, QParams(ones, 0 * ones)), 0.5)


def test_parameters_of_fewer_groups_are_not_read_beyond_their_end() -> None:
    spec, codes = QuantSpec(4, PerGroup(16)), np.full((128, 64), 3, np.uint8)
    one, wide = np.ones((1, 64), np.float32), np.ones((8, 64), np.float32)
    with pytest.raises(ValueError, match="broadcast"):
        spec.decode(codes, QParams(one, one))
    np.testing.assert_array_equal(spec.decode(codes, QParams(wide, wide[:, :1])), 2)
    np.testing.assert_array_equal(spec.project(2 * codes.astype(np.float32), QParams(one, one)), 7)


def test_arrays_must_lie_row_by_row() -> None:
    loops = Loops.of(QuantSpec(4, PerGroup(2)))
    assert loops is not None
    w = np.ones((4, 8), np.float32)[:, ::2]
    with pytest.raises(ValueError, match="takes arrays that lie row by row"):
        loops.rescale(0, w, w, w, np.ones(4, np.float32), w)


def test_no_more_rows_than_the_library_has_room_for() -> None:
    """One more would be written behind its end."""
    loops, rows = Loops.of(QuantSpec(4, PerGroup(128))), RUN + 1
    assert loops is not None
    gram, values, scale = np.eye(rows, dtype=np.float32), np.zeros((rows, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match=f"at most {RUN} rows are rounded in one call, got {rows}"):
        loops.recode(gram, np.zeros(rows, np.float32), values, scale, scale, values.copy())
