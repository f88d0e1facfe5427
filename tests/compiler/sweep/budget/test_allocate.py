"""Options within a sum of sizes: against every choice there is, on small cases."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.sweep.budget.allocate import Option, allocate, frontier, hull
from qcompile.passes.errors import UserError

OPTION = st.builds(Option, st.integers(0, 9), st.integers(1, 20), st.integers(0, 50))
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4)


def _size(chosen: list[Option[int]]) -> float:
    return sum(own.size for own in chosen)


def _cost(chosen: list[Option[int]]) -> float:
    return sum(own.cost for own in chosen)


@given(UNITS, st.integers(1, 90))
def test_a_choice_fits_and_misses_the_best_by_one_step_at_most(units: list[list[Option[int]]], size: int) -> None:
    """No choice of the same size is better by more than what the first step of all that did not fit would have gained,
    for as many bytes as are left over.
    """
    every = [list(own) for own in itertools.product(*units)]
    fitting = [own for own in every if _size(own) <= size]
    chosen = allocate(units, size)
    if chosen is None:
        assert not fitting
        return
    assert _size(chosen) <= size
    assert all(own in options for own, options in zip(chosen, units, strict=True))
    assert _cost(chosen) <= min(map(_cost, fitting)) + _slack(units, size)


def _slack(units: list[list[Option[int]]], size: float) -> float:
    """By how much the continuous optimum may be below what greedy steps reach: what is left over where the first step
    does not fit, at that step's gain for a byte (the linear bound of a knapsack).
    """
    hulls = [hull(options) for options in units]
    steps = [
        ((a.cost - b.cost) / (b.size - a.size), unit, at, b.size - a.size)
        for unit, own in enumerate(hulls)
        for at, (a, b) in enumerate(itertools.pairwise(own))
    ]
    left = size - sum(own[0].size for own in hulls)
    for gain, _, _, wide in sorted(steps, key=lambda step: (-step[0], *step[1:3])):
        if wide > left:
            return left * gain + 1e-9
        left -= wide
    return 1e-9


@given(UNITS)
def test_enough_room_costs_least_and_the_least_room_takes_least(units: list[list[Option[int]]]) -> None:
    least, most = (sum(best(o.size for o in options) for options in units) for best in (min, max))
    chosen = allocate(units, least)
    assert chosen is not None
    assert _size(chosen) == least
    assert _cost(allocate(units, most) or []) == sum(min(own.cost for own in options) for options in units)


@given(UNITS, st.integers(1, 90), st.integers(0, 30))
def test_more_room_costs_no_more(units: list[list[Option[int]]], size: int, more: int) -> None:
    """Of whole steps; what fits between two may differ by one of them."""
    few, many = allocate(units, size), allocate(units, size + more)
    if few is not None:
        assert many is not None
        gap = max(max(o.cost for o in hull(options)) - min(o.cost for o in hull(options)) for options in units)
        assert _cost(many) <= _cost(few) + gap


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
