"""benchmarks/packages.py: models of other people's packages compile by the list that suits each, within the bounds."""

from pathlib import Path

import packages
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", packages.ROWS)
def test_model(name: str, tmp_path: Path) -> None:
    found = packages.measure(name, tmp_path)
    assert not found.error
    assert found.sqnr >= packages.ROWS[name].least
    assert found.coverage >= 0.95
    assert 0 < found.after < (0.9 if packages.ROWS[name].shrinks else 1.5) * found.before
    assert found.memory < 2e9
    assert found.seconds < 120


def test_ten_packages_at_least() -> None:
    assert len({row.model.package for row in packages.ROWS.values()}) >= 10
    assert all(len(row.model.sha256) == 64 for row in packages.ROWS.values())


def test_seeds_of_calibration_and_evaluation_differ() -> None:
    for row in packages.ROWS.values():
        seen, unseen = (next(packages.batches(row.make, 1, seen=seen)) for seen in (True, False))
        assert seen.keys() == unseen.keys()
        assert any((seen[name] != unseen[name]).any() for name in seen)
