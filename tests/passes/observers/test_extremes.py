"""passes/observers/extremes.py, and what all observers have in common, through ONNX Runtime."""

import re
from pathlib import Path

import numpy as np
import pytest
from observing import GRIDS, UINT8, observe

from qcompile.passes.affine import range_qparams
from qcompile.passes.errors import UserError
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.observers.base import same_state
from qcompile.passes.observers.cross_entropy import CrossEntropy
from qcompile.passes.observers.extremes import Extremes, MinMax, MovingAverage
from qcompile.passes.observers.gram import Gram
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.observers.percentile import Percentile


def _documented() -> type[Extremes]:
    """The observer of docs/extending.md, which keeps to what the page says of all."""
    text = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Deviation" in block)
    scope: dict = {}
    exec(code, scope)
    return scope["Deviation"]


TABLE = {**OBSERVERS, "documented": _documented()}
RANGES = [name for name in TABLE if name != "gram"]
BY_CHANNEL = [name for name in RANGES if name != "cross-entropy"]
CASES = [(name, axis) for name in RANGES for axis in (None, -1, 1) if axis is None or name in BY_CHANNEL]
# What cross-entropy takes: it is measured for 8-bit integers.
INTEGERS = [grid for grid in GRIDS if not grid.is_float and grid.qmax < 256]


def _make(name: str, axis: int | None = None) -> Extremes:
    made = TABLE[name]("x", axis=axis)
    assert isinstance(made, Extremes)
    return made


def _batches(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3)).astype(np.float32) for shape in shapes]


def test_the_table_names_its_classes() -> None:
    wanted = {"gram", "minmax", "moving-average", "percentile", "entropy", "mse", "output-mse", "cross-entropy"}
    assert set(OBSERVERS) >= wanted
    assert {name for name, own in OBSERVERS.items() if not own.calibrates} == {"gram"}
    assert all(own.name == name for name, own in OBSERVERS.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2])
def test_minmax_is_numpy_s(axis, dtype) -> None:
    batches = [batch.astype(dtype) for batch in _batches([(3, 4, 5)] * 3)]
    low, high = observe(MinMax("x", axis=axis), batches, dtype).range(UINT8)
    joined = np.stack(batches).astype(np.float32)
    rest = None if axis is None else tuple({0, 1, 2, 3} - {1 + axis % 3})
    np.testing.assert_array_equal(low, np.minimum(joined.min(axis=rest), 0))
    np.testing.assert_array_equal(high, np.maximum(joined.max(axis=rest), 0))
    assert {low.dtype, high.dtype} == {np.dtype(np.float32)}


def test_moving_average_is_the_recurrence() -> None:
    batches = _batches([(2, 6), (3, 6), (1, 6)])
    own = observe(MovingAverage("x", constant=0.25), batches)
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.75 * low + 0.25 * batch.min(), 0.75 * high + 0.25 * batch.max()
    np.testing.assert_allclose(own.range(UINT8), [low, high], rtol=1e-6)
    assert (own.low, own.high) == (min(b.min() for b in batches), max(b.max() for b in batches)), "exact ones beside"


@pytest.mark.parametrize(("name", "axis"), CASES)
def test_the_range_lies_within_the_extremes_and_holds_zero(name, axis) -> None:
    for shift in (-30, 0, 30):
        own = observe(_make(name, axis), [batch + shift for batch in _batches([(2, 3, 4), (5, 3, 4)])])
        for grid in INTEGERS if name == "cross-entropy" else GRIDS:
            low, high = own.range(grid)
            assert low.shape == high.shape == (() if axis is None else (4,) if axis == -1 else (3,))
            assert (low <= 0).all()
            assert (high >= 0).all()
            assert (low >= np.minimum(own.low, 0)).all()
            assert (high <= np.maximum(own.high, 0)).all()


@pytest.mark.parametrize("number", [0.0, 5.0, -5.0, 1e-40, -1e-30, 3e38])
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_a_constant_has_a_sane_grid(name, axis, number) -> None:
    """It decodes to what it is, where the scale is a normal number; the least numbers decode to zero."""
    own = observe(_make(name, axis), [np.full((4, 2, 3), number)] * 2)
    for grid in INTEGERS if name == "cross-entropy" else GRIDS:
        low, high = own.range(grid)
        scale = range_qparams(low, high, grid).scale
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
        if name != "cross-entropy" and abs(number) > 1e-30:  # rows of equal numbers are one softmax
            np.testing.assert_allclose(low + high, np.float32(number), rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_numbers_that_are_none_are_refused(name, axis, bad) -> None:
    batch = np.ones((2, 3, 4), np.float32)
    batch[1, 2, 3] = bad
    own = observe(_make(name, axis), [np.ones((2, 3, 4))])
    with pytest.raises(UserError, match="activation x is NaN or infinite"):
        observe(own, [batch])


@pytest.mark.parametrize(("name", "axis"), CASES)
def test_a_batch_without_rows_changes_nothing(name, axis) -> None:
    empty, batches = np.zeros((0, 3, 4)), _batches([(2, 3, 4), (5, 3, 4)])
    alone = observe(_make(name, axis), [empty])
    assert alone.state() == {}
    assert alone.range(UINT8) == (0, 0)
    plain = observe(_make(name, axis), batches)
    between = observe(_make(name, axis), [empty, batches[0], empty, batches[1], empty])
    _assert_same(plain.state(), between.state())


def test_gram_keeps_to_the_same() -> None:
    batches = _batches([(4, 5), (6, 5)])
    plain = observe(Gram("x"), batches)
    _assert_same(
        observe(Gram("x"), [np.zeros((0, 5)), batches[0], np.zeros((0, 5)), batches[1]]).state(), plain.state()
    )
    batches[1][3, 2] = np.nan
    with pytest.raises(UserError, match="activation x is NaN or infinite"):
        observe(Gram("x"), batches)


@pytest.mark.parametrize(("name", "axis"), CASES)
def test_state_and_restore(name, axis) -> None:
    """Another observer, restored in the middle, ends where the first one does."""
    batches = _batches([(2, 3, 4)] * 4)
    whole = observe(_make(name, axis), batches)
    half = _make(name, axis)
    half.restore(observe(_make(name, axis), batches[:2]).state())
    _assert_same(observe(half, batches[2:]).state(), whole.state())
    assert all(isinstance(array, (np.ndarray, np.generic)) for array in whole.state().values())
    half.restore({})
    assert half.state() == {}


def test_the_observer_of_the_documentation() -> None:
    """docs/extending.md: it runs, and its range is what it says."""
    batches = _batches([(20, 30), (0, 30), (40, 30)])
    own = observe(TABLE["documented"]("x", width=2.0), batches)
    most = 2 * np.sqrt(np.mean(np.square(np.concatenate(batches).astype(np.float64))))
    np.testing.assert_allclose(own.range(UINT8), (-most, most), rtol=1e-5)
    other = TABLE["documented"]("x", width=2.0)
    other.restore(own.state())
    assert other.range(UINT8) == own.range(UINT8)


@pytest.mark.parametrize("name", RANGES)
def test_a_scalar_and_a_vector_are_activations_too(name) -> None:
    if name != "cross-entropy":  # its rows need an axis
        assert observe(_make(name), [np.float32(3)]).range(UINT8)[1] == pytest.approx(3, rel=1e-2)
    low, high = observe(_make(name), [np.array([1.0, -2.0, 3.0])]).range(UINT8)
    assert low < 0 < high


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MovingAverage("x", constant=0), "constant must be above 0"),
        (lambda: MovingAverage("x", constant=1.5), "at most 1, got 1.5"),
        (lambda: Percentile("x", percentile=101), "at most 100, got 101"),
        (lambda: Percentile("x", percentile=50), "above 50"),
        (lambda: CrossEntropy("x", axis=-1), "no axis"),
        (lambda: CrossEntropy("x", bits=4), "8 or 16, got 4"),
    ],
)
def test_bad_parameters_are_refused(make, reason) -> None:
    with pytest.raises(UserError, match=reason):
        make()


def _assert_same(own: dict, other: dict) -> None:
    assert own.keys() == other.keys()
    assert own
    for key, array in own.items():
        np.testing.assert_array_equal(array, other[key], err_msg=key)


def test_observers_without_nodes_of_their_own_learn_the_same() -> None:
    """Which read each other's saved statistics follows from the classes."""

    class Rule(Histogram):
        name = "rule"

        def range(self, spec):
            return self.low, self.high

    kinds = [*OBSERVERS.own(), Rule, _documented()]
    same = {frozenset((a.name, b.name)) for a in kinds for b in kinds if same_state(a, b) and a is not b}
    rules = ("mse", "percentile", "entropy", "rule")
    assert same == {frozenset((a, b)) for a in rules for b in rules if a != b}


def test_extremes_are_in_the_state_of_what_derives_from_them() -> None:
    for kind in (own for own in OBSERVERS.own() if issubclass(own, Extremes)):
        seen = observe(kind("x"), [np.arange(12, dtype=np.float32).reshape(4, 3)])
        assert Extremes.keys <= seen.state().keys()
        plain = observe(MinMax("x"), [np.arange(12, dtype=np.float32).reshape(4, 3)]).state()
        for key in Extremes.keys:
            np.testing.assert_array_equal(seen.state()[key], plain[key])
