"""A command's help as plain text: headings, and options with what they do beside them, as wide as the terminal."""

import inspect
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

# Columns before the text of an option; names that are longer have their text in the line below.
_INDENT = 26


class Formatter:
    """Prints what cyclopts has gathered for a help page; nothing is cut, and no name or path is broken."""

    def __init__(self, description: str, places: Sequence[str]) -> None:
        self.description = inspect.cleandoc(description)
        self._places = {place.upper(): place for place in places}

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        """The first line."""
        print(f"usage: {str(usage).strip()}")

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        """What the command is for."""
        print("\n" + reflowed(self.description))

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """One heading and its options."""
        print(f"\n{panel.title}:")
        for entry in panel.entries:
            names = [*entry.positive_shorts, *entry.positive_names, *entry.negative_names]
            place = entry.positional_label and self._places[entry.positional_label]
            label = place or " ".join(filter(None, [", ".join(names), entry.metavar]))
            print(_row(label, _text(entry.description)))


def _text(description: Any) -> str:
    primary = getattr(description, "primary_renderable", description)
    return str(getattr(primary, "plain", primary) or "")


def _width() -> int:
    return max(40, shutil.get_terminal_size().columns)


def _row(label: str, told: str) -> str:
    lines = textwrap.wrap(told, _width() - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]
    head = f"  {label}"
    if len(head) + 2 > _INDENT:
        lines, head = ["", *lines], head
    return "\n".join([f"{head:{_INDENT}}{lines[0]}".rstrip(), *(" " * _INDENT + line for line in lines[1:])])


def reflowed(text: str) -> str:
    """Paragraphs as wide as the terminal; indented lines, examples, stay as they are."""
    made: list[str] = []
    for line in text.splitlines():
        plain = bool(line) and not line.startswith(" ")
        if plain and made and made[-1] and not made[-1].startswith(" ") and not made[-1].endswith(":"):
            made[-1] += " " + line
        else:
            made.append(line)
    return "\n".join(
        line if not line or line.startswith(" ")
        else textwrap.fill(line, _width(), break_long_words=False, break_on_hyphens=False)
        for line in made
    )  # fmt: skip
