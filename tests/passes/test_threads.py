"""Work side by side: every item once, results in order, whoever helps; failures end it."""

import threading
import time

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from qcompile.passes.threads import ONE_BLAS_THREAD, limit, limited, side_by_side, workers


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_results_are_in_the_order_of_the_items(threads: int, count: int) -> None:
    """At most so many threads take part, and each knows the limit."""
    seen: set[int] = set()

    def one(item: int) -> tuple[int, int | None]:
        seen.add(threading.get_ident())
        time.sleep(0.001 * (item % 3))
        return item * item, limit()

    with limited(threads):
        assert side_by_side(one, range(count)) == [(item * item, threads) for item in range(count)]
    assert len(seen) <= threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_work_inside_work_waits_for_no_free_thread(threads: int) -> None:
    """Three levels, more items than threads on each; no more threads than were asked for at any time."""
    running, most, lock = [0], [0], threading.Lock()

    def leaf(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.0005)
        with lock:
            running[0] -= 1
        return item

    def branch(item: int) -> int:
        return sum(side_by_side(leaf, range(item)))

    with limited(threads):
        found = side_by_side(lambda item: side_by_side(branch, range(item)), range(9))
    assert found == [[sum(range(inner)) for inner in range(outer)] for outer in range(9)]
    assert most[0] <= threads


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_is_raised_and_ends_the_work(threads: int) -> None:
    begun = []

    def one(item: int) -> None:
        begun.append(item)
        time.sleep(0.001)
        if item == 3:
            raise ValueError("of item 3")

    with limited(threads), pytest.raises(ValueError, match="of item 3"):
        side_by_side(one, range(1000))
    assert len(begun) < 100


def test_without_a_limit_there_are_as_many_as_cores() -> None:
    assert workers() >= 1
    with limited(7):
        assert workers() == 7


def _blas() -> set[int]:
    return {own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_done_with_one_thread_of_blas(threads: int) -> None:
    """Inside of work, too; behind it there are as many as before."""
    with threadpool_limits(2, "blas"), limited(threads):
        seen = side_by_side(lambda _: (_blas(), *side_by_side(lambda _: _blas(), range(2)), _blas()), range(5))
        assert [own for found in seen for own in found] == [{1}] * 20
        with pytest.raises(ValueError, match="no"):
            side_by_side(lambda _: int("no"), range(3))
        assert _blas() == {2}


def test_a_block_within_a_block_ends_with_the_outer_one() -> None:
    with threadpool_limits(2, "blas"):
        with ONE_BLAS_THREAD:
            with ONE_BLAS_THREAD:
                assert _blas() == {1}
            assert _blas() == {1}
        assert _blas() == {2}
