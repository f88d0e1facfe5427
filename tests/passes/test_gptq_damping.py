"""gptq(damping=held): rows held aside choose among dampings, and what is chosen is what rounds."""

from dataclasses import replace

import numpy as np
import pytest

from qcompile.models.tiny import tiny_mlp
from qcompile.passes.base import Region
from qcompile.passes.gptq import Beside, ErrorCompensated, Gptq, damped_by_rows, default_damping
from qcompile.passes.held import row_weights
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import weight_state
from qcompile.passes.statistics import Statistics

SPEC = QuantSpec(4, PerGroup(16))


def _known(x: np.ndarray) -> Statistics:
    x = x.astype(np.float32)
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), sample=x)


def _alike(rows: int, k: int, seed: int, noise: float) -> np.ndarray:
    """Rows of a few directions and noise: the less of it, the more the Gram matrix can be believed."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 6)) @ rng.standard_normal((6, k)) + noise * rng.standard_normal((rows, k))


@pytest.mark.parametrize(("rows", "noise"), [(4000, 0.05), (60, 3.0), (300, 0.5)])
def test_the_damping_of_least_error_on_unseen_rows_is_taken(rows: int, noise: float) -> None:
    k, x = 64, _alike(rows, 64, 0, noise)
    w = np.random.default_rng(1).standard_normal((k, 40)).astype(np.float32)
    statistics = _known(x)
    parts = statistics.split()
    assert parts is not None
    rest, held = parts
    losses = {}
    for factor in (0.3, 1.0, 3.0):
        own = ErrorCompensated(factor * default_damping(k, rest.rows), sweeps=0, refit=False)
        errors = np.square(held.astype(np.float64) @ (own(w, SPEC, rest).dequantize() - w)).sum(axis=1)
        losses[factor] = row_weights(held, statistics) @ errors
    wanted = min(losses, key=losses.__getitem__) * default_damping(k, rows)
    rounding = ErrorCompensated(sweeps=2)
    found = damped_by_rows(rounding, Beside([w[:, :30], w[:, 30:]]), SPEC, statistics)
    assert found == replace(rounding, damping=pytest.approx(wanted))


def test_dampings_differ_with_what_the_rows_say() -> None:
    w = np.random.default_rng(1).standard_normal((64, 40)).astype(np.float32)
    few, many = (
        damped_by_rows(ErrorCompensated(), Beside([w]), SPEC, _known(_alike(rows, 64, 0, noise)))
        for rows, noise in ((60, 3.0), (4000, 0.05))
    )
    assert few.damping / default_damping(64, 60) > many.damping / default_damping(64, 4000)


@pytest.mark.parametrize("rows", [6, None])
def test_without_rows_to_judge_by_it_stays(rows: int | None) -> None:
    statistics, w = _known(_alike(rows or 100, 64, 0, 1.0)), np.ones((64, 4), np.float32)
    if rows is None:
        statistics = replace(statistics, sample=None)
    assert damped_by_rows(ErrorCompensated(), Beside([w]), SPEC, statistics) == ErrorCompensated()


def test_the_pass_rounds_by_it() -> None:
    model = tiny_mlp()
    linear = find_linears(model.graph)[0]
    statistics = _known(_alike(400, linear.shape[0], 0, 0.5))
    region = Region(model, [linear.node])
    region.statistics[linear.activation] = statistics
    step = Gptq(Policy(SPEC, None, None), damping="held")
    step.call(region)
    assert [decision.action for decision in step.decisions] == ["rounded"]
    own = damped_by_rows(ErrorCompensated(), Beside([linear.read()]), SPEC, statistics)
    wanted = own(linear.read(), SPEC, statistics)
    np.testing.assert_array_equal(weight_state(linear.weight).codes[linear.transposed].codes, wanted.codes)
