"""How far outputs are from the float model's: every output counts, and tokens that cannot come add nothing."""

import numpy as np
import pytest

from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.distance import LogitsKl, OutputSqnr
from qcompile.passes.errors import UserError

ONES = np.ones((2, 4), np.float32)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_number_that_is_none_is_never_hidden_by_another_output(names: tuple[str, str], wrong: float) -> None:
    """Whichever of the outputs has it: Python's max passes over NaN."""
    broken: Arrays = {"a": 1.1 * ONES, "b": np.where(np.eye(2, 4), wrong, ONES)}
    with pytest.raises(UserError, match="output 'b' is NaN or infinite"):
        OutputSqnr(names, [{"a": ONES, "b": ONES}]).distance([broken])


def test_the_output_that_is_worst_off_counts() -> None:
    made = OutputSqnr(["a", "b"], [{"a": ONES, "b": ONES}]).distance([{"a": 1.1 * ONES, "b": 1.2 * ONES}])
    assert made == pytest.approx(0.2, rel=1e-6)


def test_zeros_have_no_relative_error() -> None:
    zeros = OutputSqnr(["a", "b"], [{"a": 0 * ONES, "b": ONES}])
    assert zeros.distance([{"a": 0 * ONES, "b": 1.1 * ONES}]) == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(UserError, match="output 'a' is zero in float wherever it is compared"):
        zeros.distance([{"a": 1e-9 * ONES, "b": ONES}])


def test_tokens_that_cannot_come_add_nothing() -> None:
    """Of a head that masks some of the vocabulary."""
    logits = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    masked = np.concatenate([logits, np.full((1, 3, 2), -np.inf, np.float32)], axis=2)
    known, same = (LogitsKl("y", [{"y": own}]) for own in (logits, masked))
    assert same.distance([{"y": masked}]) == 0
    plain = known.distance([{"y": logits**2}])
    assert plain > 0.1
    other = np.concatenate([logits**2, np.full((1, 3, 2), -np.inf, np.float32)], axis=2)
    assert same.distance([{"y": other}]) == pytest.approx(plain, rel=1e-6)
    with pytest.raises(UserError, match="output 'y' is NaN or infinite"):
        LogitsKl("y", [{"y": logits**2}]).distance([{"y": np.where(logits > 1, -np.inf, logits)}])
