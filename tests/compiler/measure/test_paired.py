"""measure/paired.py: tests and intervals against tables, and against how often they hold in seeded trials."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.measure.paired import Clusters, Paired, mcnemar, newcombe, student, wilson

COUNTS = st.integers(0, 300)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (0, 5, 2 / 32), (59, 41, 0.08862608)],
)
def test_mcnemar_is_the_binomial_tail(lost: int, won: int, p: float) -> None:
    """The last one as R's binom.test(59, 100) has it."""
    assert mcnemar(lost, won) == pytest.approx(p, rel=1e-6)


def test_mcnemar_of_many() -> None:
    """Where float64 has no power of two that large: the normal tail, with its correction for continuity."""
    z = (2600 - 2400 - 1) / math.sqrt(5000)
    assert mcnemar(2400, 2600) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def test_intervals_as_tables_have_them() -> None:
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)  # the same, on paired shares
    assert wilson(0.0, 20)[0] == 0.0
    assert wilson(1.0, 20)[1] == 1.0
    for freedom, quantile in ((1, 12.7062), (2, 4.30265), (7, 2.36462), (15, 2.13145), (100, 1.98397)):
        assert student(freedom) == pytest.approx(quantile, rel=4e-4)
    assert student(3) == pytest.approx(3.18245, rel=8e-3)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
@settings(max_examples=200, deadline=None)
def test_newcombe_holds_the_difference(both: int, lost: int, won: int, neither: int) -> None:
    """Inside -1 to 1, turned round with the models, and never empty."""
    count = both + lost + won + neither
    if not count:
        return
    low, high = newcombe(both, lost, won, neither)
    assert -1 - 1e-9 <= low <= (lost - won) / count + 1e-9
    assert (lost - won) / count - 1e-9 <= high <= 1 + 1e-9
    assert newcombe(both, won, lost, neither) == pytest.approx((-high, -low), abs=1e-9)
    assert high - low > 1e-6


@pytest.mark.parametrize("shares", [(0.6, 0.1, 0.06, 0.24), (0.9, 0.04, 0.01, 0.05)])
def test_newcombe_holds_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    """2,000 draws of 120 decisions: 95 %, or more where few differ; pairs taken as independent are wider."""
    draws = np.random.default_rng(0).multinomial(120, shares, size=2000)
    found = np.array([newcombe(*map(int, draw)) for draw in draws])
    truth = shares[1] - shares[2]
    assert 0.935 < np.mean((found[:, 0] <= truth) & (truth <= found[:, 1])) < 0.985
    a, b = shares[0] + shares[1], shares[0] + shares[2]
    unpaired = 2 * 1.96 * math.sqrt((a * (1 - a) + b * (1 - b)) / 120)
    assert np.mean(found[:, 1] - found[:, 0]) < 0.9 * unpaired


def test_clusters_hold_where_tokens_taken_as_independent_do_not() -> None:
    """16 clusters of 50 values of which half of the variance is the cluster's own."""
    generator, index = np.random.default_rng(0), np.repeat(np.arange(16), 50)
    clusters, alone = Clusters(index), Clusters(np.arange(800))
    held = {"clusters": 0, "alone": 0, "share": 0}
    for _ in range(400):
        values = generator.standard_normal(16)[index] + generator.standard_normal(800)
        for name, own in (("clusters", clusters), ("alone", alone)):
            low, high = own.mean(values) or (1.0, -1.0)
            held[name] += low <= 0 <= high
        low, high = clusters.share(values > 1.0) or (1.0, -1.0)
        held["share"] += low <= 0.2398 <= high  # 1 - Φ(1 / √2)
    assert 0.92 < held["clusters"] / 400 < 0.98
    assert 0.91 < held["share"] / 400 < 0.985
    assert held["alone"] / 400 < 0.6


def test_a_drop_of_few_decisions_is_not_known_too_well() -> None:
    """8 clusters of 20, one decision in a hundred differs: in many draws none does, and an interval by t is empty."""
    generator, clusters = np.random.default_rng(0), Clusters(np.repeat(np.arange(8), 20))
    held = {"drop": 0, "mean": 0}
    for _ in range(300):
        before, chance = generator.random(160) < 0.3, generator.random(160)
        lost, won = chance < 0.006, (chance >= 0.006) & (chance < 0.01)
        was, now = (before | lost) & ~won, (before | won) & ~lost
        found = {"drop": clusters.drop(was, now), "mean": clusters.mean(was.astype(np.float64) - now)}
        for name, own in found.items():
            low, high = own or (1.0, -1.0)
            held[name] += low <= 0.002 <= high
    assert held["mean"] / 300 < 0.85 < 0.95 < held["drop"] / 300


def test_one_cluster_has_no_interval() -> None:
    one = Clusters(np.zeros(5, np.int64))
    assert (one.mean(np.arange(5.0)), one.share(np.arange(5) > 2), one.error(np.arange(5.0))) == (None, None, None)
    assert one.drop(np.arange(5) > 2, np.arange(5) > 3) is None
    two = Clusters(np.array([0, 0, 1, 1]))
    assert two.mean(np.array([1.0, np.inf, 0.0, 0.0])) is None


def test_paired_counts() -> None:
    before, after = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    found = Paired.of(before, after)
    assert (found.count, found.lost, found.won, found.reference, found.accuracy) == (5, 2, 1, 0.6, 0.4)
    assert found.accuracy_drop == pytest.approx(0.2)
    assert found.accuracy_drop_low < 0 < found.accuracy_drop_high
    assert found.mcnemar_p == 1.0
    with pytest.raises(ValueError, match="decisions of shape"):
        Paired.of(before[:0], after[:0])
