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
    """No choice of the same size is better by more than the step of one unit that did not fit any more."""
    every = [list(own) for own in itertools.product(*units)]
    fitting = [own for own in every if _size(own) <= size]
    chosen = allocate(units, size)
    if chosen is None:
        assert not fitting
        return
    assert _size(chosen) <= size
    assert all(own in options for own, options in zip(chosen, units, strict=True))
    gap = max(max(o.cost for o in hull(options)) - min(o.cost for o in hull(options)) for options in units)
    assert _cost(chosen) <= min(map(_cost, fitting)) + gap


@given(UNITS)
def test_all_of_the_frontier_are_the_best_of_their_size(units: list[list[Option[int]]]) -> None:
    every = [list(own) for own in itertools.product(*units)]
    points = frontier(units)
    assert _size(points[0]) == sum(min(own.size for own in options) for options in units)
    assert _cost(points[-1]) == sum(min(own.cost for own in options) for options in units)
    for point in points:
        assert _cost(point) == min(_cost(own) for own in every if _size(own) <= _size(point))


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
