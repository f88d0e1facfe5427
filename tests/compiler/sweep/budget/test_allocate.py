"""Options within a sum of sizes: against every choice there is, on small cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.sweep.budget.allocate import Option, allocate, frontier, keeping
from qcompile.passes.errors import UserError

OPTION = st.builds(Option, st.integers(0, 9), st.integers(1, 20), st.integers(0, 50))
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4)


def _size(chosen: list[Option[int]]) -> float:
    return sum(own.size for own in chosen)


def _cost(chosen: list[Option[int]]) -> float:
    return sum(own.cost for own in chosen)


@given(UNITS, st.integers(1, 90))
def test_a_choice_fits_and_no_other_is_better_by_more_than_a_thousandth(
    units: list[list[Option[int]]], size: int
) -> None:
    fitting = [own for own in map(list, itertools.product(*units)) if _size(own) <= size]
    chosen = allocate(units, size)
    if chosen is None:
        assert not fitting
        return
    assert _size(chosen) <= size
    assert all(own in options for own, options in zip(chosen, units, strict=True))
    assert _cost(chosen) * 0.999 <= min(map(_cost, fitting)) + 1e-9


@given(UNITS, st.integers(0, 200))
def test_what_keeps_a_cost_does_and_none_that_does_is_smaller_by_more_than_a_thousandth(
    units: list[list[Option[int]]], cost: int
) -> None:
    """Where none keeps it, the one of least cost is taken, the smallest of them."""
    every = list(map(list, itertools.product(*units)))
    holding = [own for own in every if _cost(own) <= cost]
    chosen = keeping(units, cost)
    assert all(own in options for own, options in zip(chosen, units, strict=True))
    if not holding:
        assert (_cost(chosen), _size(chosen)) == min((_cost(own), _size(own)) for own in every)
        return
    assert _cost(chosen) <= cost
    assert _size(chosen) * 0.999 <= min(map(_size, holding)) + 1e-9


def test_what_the_hull_leaves_out_fills_what_is_left_over() -> None:
    """Of two units alike one step of the hull fits, and less than another is left: 10, and 6 for the option between."""
    unit = [Option(0, 10, 40.0), Option(1, 16, 36.0), Option(2, 20, 0.0)]
    assert allocate([unit, unit], 36) in ([unit[2], unit[1]], [unit[1], unit[2]])
    assert keeping([unit, unit], 40.0) in ([unit[2], unit[0]], [unit[0], unit[2]])
    assert _size(keeping([unit, unit], 76.0)) == 26


@pytest.mark.parametrize("cost", [-math.inf, math.inf])
def test_bounds_without_end(cost: float) -> None:
    units = [[Option(0, 10, 40.0), Option(1, 20, 0.0)]] * 3
    assert [own.what for own in keeping(units, cost)] == [int(cost < 0)] * 3


def test_many_units_are_near_what_no_choice_is_below() -> None:
    """Sums between the frontier's: the line there is a bound on all choices."""
    random = np.random.default_rng(0)
    bits = np.array([3.2, 4.2, 5.2, 6.2, 8.2])
    units = [
        [Option(i, size * own, cost * 4.0**-own) for i, own in enumerate(bits)]
        for size, cost in zip(random.uniform(1, 30, 60), 10 ** random.uniform(-2, 1, 60), strict=True)
    ]
    made = frontier(units)
    sizes, costs = np.array([(_size(own), _cost(own)) for own in made]).T
    for size in random.uniform(sizes[0], sizes[-1], 20):
        chosen = allocate(units, size)
        assert chosen is not None
        assert _size(chosen) <= size
        assert _cost(chosen) <= 1.005 * np.interp(size, sizes, costs)


@given(UNITS)
def test_enough_room_costs_least_and_the_least_room_takes_least(units: list[list[Option[int]]]) -> None:
    least, most = (sum(best(o.size for o in options) for options in units) for best in (min, max))
    chosen = allocate(units, least)
    assert chosen is not None
    assert _size(chosen) == least
    assert _cost(allocate(units, most) or []) == sum(min(own.cost for own in options) for options in units)


@given(UNITS, st.integers(1, 90), st.integers(0, 30))
def test_more_room_costs_no_more(units: list[list[Option[int]]], size: int, more: int) -> None:
    """To the thousandth that choices are from the best."""
    few, many = allocate(units, size), allocate(units, size + more)
    if few is not None:
        assert many is not None
        assert _cost(many) * 0.999 <= _cost(few) + 1e-9


@pytest.mark.parametrize(
    ("text", "amount"),
    [("80MB", Amount(size=80_000_000)), ("1.5 GiB", Amount(size=1_610_612_736)), ("3.6bpw", Amount(bits=3.6)),
     (".5mb", Amount(size=500_000)), ("4 BPW", Amount(bits=4.0))],
)  # fmt: skip
def test_amounts(text: str, amount: Amount) -> None:
    assert Amount.parse(text) == amount


@pytest.mark.parametrize("text", ["80", "MB", "-3MB", "0MB", "3.6 bits", "1e3MB", "80MB of it", "", "nanbpw"])
def test_what_is_no_amount_is_told(text: str) -> None:
    with pytest.raises(UserError, match=r"give the size of the output, 80MB, or bits a weight, 3.6bpw"):
        Amount.parse(text)


@given(UNITS)
def test_the_frontier_is_convex_and_nothing_is_below_it(units: list[list[Option[int]]]) -> None:
    made = frontier(units)
    places = [(_size(own), _cost(own)) for own in made]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(places)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    for own in map(list, itertools.product(*units)):
        size = _size(own)
        if size >= places[-1][0]:
            assert _cost(own) >= places[-1][1]
        for a, b in itertools.pairwise(places):
            if a[0] <= size <= b[0]:
                line = a[1] + (b[1] - a[1]) * (size - a[0]) / (b[0] - a[0])
                assert _cost(own) >= line - 1e-9
    assert all(allocate(units, size) is not None for size, _ in places)
