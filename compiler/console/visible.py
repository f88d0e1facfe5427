"""Strangers' names made harmless to print: the one place that renders them for messages, terminals, pages and files."""

from collections.abc import Iterable
from pathlib import Path


def visible(text: str) -> str:
    """The text with every unprintable character (controls, line ends, U+202E, lone surrogates) as \\uXXXX.

    What comes out is one line that UTF-8 can encode.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def told_apart(paths: Iterable[str]) -> dict[str, str]:
    """By path, the name of its file, behind as many folders as tell it from all others."""
    parts = {path: Path(path).parts for path in paths}
    found = {}
    for path, own in parts.items():
        others = [other for other in parts.values() if other != own]
        counts = range(1, len(own))
        least = next((n for n in counts if all(other[-n:] != own[-n:] for other in others)), len(own))
        found[path] = str(Path(*own[-least:])) if own else path
    return found
