"""measure/changes.py: what became of tokens, against the definitions written out here."""

import numpy as np
import pytest

from qcompile.compiler.measure.changes import TokenChanges
from qcompile.compiler.measure.metrics import TokenScores, log_softmax_rows


def _scores(logits: list[np.ndarray], targets: list[np.ndarray], before: list[np.ndarray] | None) -> TokenScores:
    made = TokenScores()
    for number, (own, wanted) in enumerate(zip(logits, targets, strict=True)):
        made.add(own, wanted, None if before is None else log_softmax_rows(before[number]))
    return made


def _changes(windows: int, length: int, *, noise: float = 0.5) -> tuple[TokenChanges, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    before = [generator.standard_normal((length, 11)).astype(np.float32) for _ in range(windows)]
    after = [own + noise * generator.standard_normal(own.shape).astype(np.float32) for own in before]
    targets = [generator.integers(0, 11, length) for _ in range(windows)]
    found = TokenChanges.of(_scores(before, targets, None), _scores(after, targets, before))
    x, y = (np.concatenate(own).astype(np.float64) for own in (before, after))
    p, q = (own - np.log(np.exp(own).sum(axis=1, keepdims=True)) for own in (x, y))
    wanted = np.concatenate(targets)
    return found, {
        "kl": (np.exp(p) * (p - q)).sum(axis=1),
        "was": p.argmax(axis=1) == wanted,
        "now": q.argmax(axis=1) == wanted,
        "flipped": p.argmax(axis=1) != q.argmax(axis=1),
        "worse": (p - q)[np.arange(len(wanted)), wanted],
        "place": np.tile(np.arange(length) + 1, windows),
    }


def test_figures_equal_the_definitions() -> None:
    found, known = _changes(9, 150)
    was, now = known["was"], known["now"]
    assert found.flips == known["flipped"].mean() > 0.1
    assert (found.flips_lost, found.flips_won) == ((was & ~now).mean(), (now & ~was).mean())
    assert found.accuracy_drop == pytest.approx(was.mean() - now.mean(), abs=1e-12)
    assert found.perplexity_ratio == pytest.approx(np.exp(known["worse"].mean()), rel=1e-5)
    assert found.clusters == 9
    ordered = np.sort(known["kl"])
    assert [found.kl_p50, found.kl_p90, found.kl_p99, found.kl_max] == pytest.approx(
        [ordered[int(np.ceil(share * 1350)) - 1] for share in (0.5, 0.9, 0.99, 1.0)], rel=1e-3
    )
    for low, middle, high in (
        (found.flips_low, found.flips, found.flips_high),
        (found.accuracy_drop_low, found.accuracy_drop, found.accuracy_drop_high),
        (found.perplexity_ratio_low, found.perplexity_ratio, found.perplexity_ratio_high),
        (found.kl_low, known["kl"].mean(), found.kl_high),
    ):
        assert low is not None
        assert high is not None
        assert low < middle < high


def test_kl_by_position() -> None:
    """Bins of tokens behind so many others; they hold every token, and their mean is the mean."""
    found, known = _changes(2, 150)
    bins = found.kl_by_position
    assert [(one.first, one.last, one.tokens) for one in bins] == [(1, 31, 62), (32, 127, 192), (128, 150, 46)]
    for one in bins:
        chosen = known["kl"][(known["place"] >= one.first) & (known["place"] <= one.last)]
        assert one.kl == pytest.approx(chosen.mean(), rel=1e-4)
    assert sum(one.kl * one.tokens for one in bins) / 300 == pytest.approx(known["kl"].mean(), rel=1e-4)


@pytest.mark.parametrize(("windows", "length", "clusters"), [(8, 100, 8), (7, 100, 14), (1, 64, 1), (1, 65, 2)])
def test_clusters_are_windows_or_runs_of_tokens(windows: int, length: int, clusters: int) -> None:
    found, _ = _changes(windows, length)
    assert found.clusters == clusters
    assert (found.flips_low is None) == (clusters == 1)


def test_equal_models_change_nothing() -> None:
    found, _ = _changes(8, 40, noise=0.0)
    assert (found.flips, found.flips_lost, found.accuracy_drop, found.perplexity_ratio) == (0, 0, 0, 1)
    assert found.kl_max == 0
    assert (found.perplexity_ratio_low, found.perplexity_ratio_high) == (1, 1)
    assert (found.kl_low, found.kl_high) == (0, 0)
    assert found.accuracy_drop_low is not None
    assert found.accuracy_drop_high is not None
    assert found.accuracy_drop_low < 0 < found.accuracy_drop_high, "320 tokens do not show that none is ever lost"
    assert found.flips_low == 0
    assert found.flips_high is not None
    assert found.flips_high > 0, "nothing seen in 320 tokens is not nothing"
