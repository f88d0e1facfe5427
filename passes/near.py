"""What a mistyped name may have been meant for."""

import difflib
from collections.abc import Iterable

# How alike words are at least, 0 to 1, as difflib counts.
_ALIKE = 0.6
# Names that are looked at: the time grows with them.
_MOST = 2000


def nearest(word: str, names: Iterable[str], most: int = 1, *, alike: float = _ALIKE) -> list[str]:
    """The names most like a word, the nearest first; none that are less alike than that."""
    return difflib.get_close_matches(word, list(names)[:_MOST], n=most, cutoff=alike)


def did_you_mean(word: str, names: Iterable[str], otherwise: str, most: int = 1, *, alike: float = _ALIKE) -> str:
    """The question after the nearest names, or what is said where none is near."""
    found = nearest(word, names, most, alike=alike)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else otherwise


def near(word: str, names: Iterable[str]) -> str:
    """The same as the end of a sentence, which it leaves as it is where no name is near."""
    found = did_you_mean(word, names, "")
    return f": {found}" if found else ""
