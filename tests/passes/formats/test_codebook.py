"""Pairs of a codebook: the codebooks, the nearest pair by any metric, and error compensation of two rows at a time."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes.affine import Grid, QParams
from qcompile.passes.algebra import Compensation
from qcompile.passes.bit_fields import from_stream, to_stream
from qcompile.passes.codebooks import CODEBOOKS, fitted
from qcompile.passes.formats import FORMATS, named
from qcompile.passes.formats.codebook import CodebookPairs
from qcompile.passes.gptq import ErrorCompensated, _compensate, _Descending
from qcompile.passes.linears import constant
from qcompile.passes.rounding import column_errors, round_to_nearest
from qcompile.passes.spec import PerChannel, QuantSpec
from qcompile.passes.statistics import Statistics

NAMES = [own.name for own in FORMATS if isinstance(own, CodebookPairs)]
# By the bits of a code: signal to noise in dB of normal numbers, a tenth below what was found; k-means finds no better.
LEAST = {4: 9.55, 5: 12.25, 6: 15.1, 7: 18.0, 8: 20.9}


def _grid(name: str) -> Grid:
    return named(name).grid("qcompile")


def _problem(k: int, n: int, *, seed: int = 0) -> tuple[np.ndarray, Statistics]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, k)) @ (np.eye(k) + 0.5 * rng.standard_normal((k, k))) * rng.lognormal(0, 0.7, k)
    x = x.astype(np.float32)
    return rng.standard_normal((k, n)).astype(np.float32), Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))


@pytest.mark.parametrize("bits", [4, 6, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 7, 8))])
def test_a_codebook_is_what_its_function_makes(bits: int) -> None:
    made, stored = fitted(bits), CODEBOOKS[bits]
    np.testing.assert_array_equal(made.pairs, stored.pairs)
    assert made.deviation == stored.deviation


@pytest.mark.parametrize("bits", sorted(CODEBOOKS))
def test_a_codebook_serves_normal_numbers(bits: int) -> None:
    """Every pair once, zero exactly, and as little noise as the best quantizers of so many points leave."""
    book = CODEBOOKS[bits]
    assert len({tuple(pair) for pair in book.pairs.tolist()}) == 1 << bits
    assert book.pairs[0].tolist() == [0, 0]
    assert np.abs(book.pairs.astype(int)).max() == 127
    x = (np.random.default_rng(0).standard_normal((2, 400_000)) * book.deviation).astype(np.float32)
    found = book.pairs[book.nearest(*x)].T
    assert 10 * np.log10(np.square(x).sum() / np.square(found - x).sum()) > LEAST[bits]


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(sorted(CODEBOOKS)), size=st.sampled_from([1.0, 40.0, 120.0]), seed=st.integers(0, 999))
def test_the_nearest_pair_is_the_nearest_to_halves(bits: int, size: float, seed: int) -> None:
    book = CODEBOOKS[bits]
    x = (np.random.default_rng(seed).standard_normal((2, 50)) * size).astype(np.float32)
    halves = np.clip(np.rint(2 * x) / 2, -256, 255.5).astype(np.float64)
    far = np.square(halves[:, :, None] - book.pairs.T[:, None].astype(np.float64)).sum(axis=0)
    np.testing.assert_array_equal(book.nearest(*x), far.argmin(axis=1))
    alone = np.abs(x[0][:, None] - book.pairs[:, 0])
    np.testing.assert_array_equal(book.nearest_first(x[0]), alone.argmin(axis=1))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 999), each=st.booleans())
def test_the_nearest_pair_by_a_metric_is_the_nearest(name: str, seed: int, each: bool) -> None:
    """Of one metric for all columns, or one for each."""
    rng, spec, n = np.random.default_rng(seed), _grid(name), 30
    root = rng.standard_normal((2, 2, n if each else 1))
    metric = (np.einsum("ikn,jkn->ijn", root, root) + 0.1 * np.eye(2)[:, :, None]).astype(np.float32)
    w, scale = rng.standard_normal((2, n)).astype(np.float32), np.full((1, n), 0.02, np.float32)
    codes = spec.project_by(w, QParams(scale, np.zeros_like(scale)), metric)
    np.testing.assert_array_equal(codes[0], codes[1])
    pairs = named(name).grid("qcompile").book.pairs.T.astype(np.float64) * 0.02  # type: ignore[attr-defined]
    left = w[:, :, None] - pairs[:, None]
    far = np.einsum("int,ijn,jnt->nt", left, np.broadcast_to(metric, (2, 2, n)).astype(np.float64), left)
    assert (far[np.arange(n), codes[0]] <= far.min(axis=1) * (1 + 1e-3) + 1e-5).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 60), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_codes_are_stored_without_loss(name: str, k: int, n: int, seed: int) -> None:
    """In fields of bytes, and as a stream of bits, one code for two rows."""
    own, spec = named(name), _grid(name)
    quantized = round_to_nearest(np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32), spec, None)
    tensors = own.store(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), "w", quantized)
    codes = own.codes(tensors.codes, k)
    np.testing.assert_array_equal(codes, quantized.codes)
    np.testing.assert_array_equal(codes[0 : k // 2 * 2 : 2], codes[1::2])
    stream = to_stream(codes[::2], spec.code_bits)
    assert len(stream) == -(-codes[::2].size * spec.code_bits // 8)
    np.testing.assert_array_equal(from_stream(stream, spec.code_bits, codes[::2].shape), codes[::2])
    assert constant(tensors.codes).nbytes * 8 / n + 32 == pytest.approx(spec.bits_per_weight(k) * k)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_searched_for_without_data(name: str) -> None:
    """Of heavy tails, too: the scale that is best for normal numbers leaves more."""
    spec, rng = _grid(name), np.random.default_rng(0)
    for w in (rng.standard_normal((200, 20)), rng.standard_t(3, (200, 20)), 100 * rng.uniform(-1, 1, (200, 20))):
        w = w.astype(np.float32)
        found, plain = spec.fit(w), spec.span(w[None], np.float32(1))
        errors = [np.square(spec.decode(spec.project(w, own), own) - w).sum(axis=0) for own in (found, plain)]
        assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.98 * errors[1].sum()


def _textbook(w: np.ndarray, gram: np.ndarray, scale: np.ndarray, spec: Grid) -> np.ndarray:
    """Block LDLQ in float64, the inverse Hessian updated after each pair: codes (K, N). The pair of least error given
    that all rows behind it will follow freely; pairs of most energy first, before them a row that is left over.
    """
    k, work, inverse = len(w), w.astype(np.float64), np.linalg.inv(gram.astype(np.float64))
    codes = np.zeros(w.shape, int)
    pairs = sorted(range(0, k // 2 * 2, 2), key=lambda i: -gram[i, i] - gram[i + 1, i + 1])
    for first in [*range(k // 2 * 2, k), *pairs]:
        rows = list(range(first, min(first + 2, k)))
        book = spec.book.pairs.T.astype(np.float64)[: len(rows)]  # type: ignore[attr-defined]
        metric = np.linalg.inv(inverse[np.ix_(rows, rows)])
        left = work[rows][:, :, None] - book[:, None] * scale[None, 0, :, None]
        own = np.einsum("int,ij,jnt->nt", left, metric, left).argmin(axis=1)
        codes[rows] = own
        error = metric @ (work[rows] - book[:, own] * scale)
        change = inverse[:, rows]
        work -= change @ error
        inverse -= change @ metric @ change.T
    return codes


@pytest.mark.parametrize("name", ["pairs2", "pairs3.5"])
@pytest.mark.parametrize("k", [1, 2, 7, 40, 151])
def test_the_sweep_rounds_two_rows_at_once_as_the_textbook_does(name: str, k: int) -> None:
    w, statistics = _problem(k, 6, seed=k)
    spec = _grid(name)
    gram = statistics.gram + np.diag(0.01 * np.diagonal(statistics.gram))
    qparams = spec.fit(w)
    by = Compensation.of(gram, np.zeros(k, np.float32), spec.rows_per_code)
    swept, left = _compensate(w, by, qparams, spec)
    wanted = _textbook(w, gram, qparams.scale.astype(np.float64), spec)
    np.testing.assert_array_equal(swept.codes, wanted)
    delta = swept.dequantize().astype(np.float64) - w
    np.testing.assert_allclose(np.square(left).sum(axis=0), column_errors(delta, gram.astype(np.float64)), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [2, 41, 150])
def test_descent_lets_the_error_of_no_column_rise(name: str, k: int) -> None:
    w, statistics = _problem(k, 20, seed=1)
    start = round_to_nearest(w, _grid(name), None)
    own = _Descending(statistics.gram, np.zeros(k, np.float32), w, start)
    before = column_errors(start.dequantize().astype(np.float64) - w, statistics.gram.astype(np.float64))
    first = before.sum()
    for number in range(4):
        own.round(forward=number % 2 == 0, codes=True, scales=True)
        now = copy.deepcopy(own.moving.result())
        np.testing.assert_array_equal(now.codes[0 : k // 2 * 2 : 2], now.codes[1::2])
        after = column_errors(now.dequantize().astype(np.float64) - w, statistics.gram.astype(np.float64))
        assert (after <= before * (1 + 1e-4) + 1e-6 * statistics.gram.max()).all()
        before = after
    assert before.sum() < 0.9 * first


def test_pairs_leave_less_error_than_integers_of_as_many_bits() -> None:
    """Normal weights, a scale for each column, error compensation: 3 bits, and 4."""
    w, statistics = _problem(128, 40)
    for name, bits in (("pairs3", 3), ("pairs4", 4)):
        pairs, integers = (
            column_errors(ErrorCompensated(0.01)(w, spec, statistics).dequantize() - w, statistics.gram).sum()
            for spec in (_grid(name), QuantSpec(bits, PerChannel(1), symmetric=True))
        )
        assert pairs < 0.75 * integers
