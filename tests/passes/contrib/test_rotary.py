"""passes/contrib/rotary.py: what may be a query or key before it is turned."""

from collections.abc import Sequence

import pytest

from qcompile.passes.contrib.rotary import _alike


@pytest.mark.parametrize(
    ("sizes", "alike"),
    [
        (("b", 4, "s", 16), True),
        (("b", "h", "s", 16), True),
        (("b", None, "s", 16), True),
        (("b", 2, "s", 16), False),
        (("b", 4, "s", 8), False),
        ((4, "s", 16), False),
    ],
)
def test_as_many_heads_where_they_are_counted_and_as_wide(sizes: Sequence[int | str | None], alike: bool) -> None:
    assert _alike(sizes, ("b", 4, "s", 16)) is alike
    assert _alike(("b", 4, "s", 16), sizes) is alike
