"""Names that a mistyped one may have been meant for."""

import pytest

from qcompile.passes.near import did_you_mean, nearest


@pytest.mark.parametrize(
    ("word", "most", "told"),
    [
        ("evla", 1, "did you mean 'eval'?"),
        ("sweap", 1, "did you mean 'sweep'?"),
        ("swep", 2, "did you mean 'sweep' or 'sleep'?"),
        ("zzz", 1, "none"),
        ("", 3, "none"),
    ],
)
def test_the_nearest_names_are_asked_after(word, most, told) -> None:
    assert did_you_mean(word, ["eval", "sweep", "sleep", "inspect"], "none", most) == told


def test_names_need_not_be_alike_where_that_is_asked_for() -> None:
    assert nearest("zzz", iter(["a", "zz", "b"]), 1) == ["zz"]
    assert len(nearest("q", ["a", "b", "c"], 2, alike=0.0)) == 2
