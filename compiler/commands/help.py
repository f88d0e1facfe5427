"""A command's help as plain text: headings, and options with what they do beside them, as wide as the terminal."""

import inspect
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from qcompile.compiler.commands.options import COMMON, group

# Columns before the text of an option; names that are longer have their text in the line below.
_INDENT = 26


def show(usage: str, declared: Any, arguments: Iterable[Any]) -> None:
    """Print the help of a command: nothing is cut, and no name or path is broken.

    declared: its `Options`. arguments: as cyclopts has them, whose own pages take longer to load than all the rest.
    """
    print(f"usage: {usage}\n\n{reflowed(inspect.cleandoc(declared.__doc__ or ''))}")
    rows: dict[Any, list[str]] = {}
    for own in arguments:
        if own.parameter.show is not False:
            rows.setdefault(own.parameter.group[0], []).append(_row(_label(own), own.parameter.help or ""))
    rows.setdefault(group(COMMON), []).append(_row("-h, --help", "show this and stop"))
    for heading, lines in sorted(rows.items(), key=lambda item: item[0].sort_key):
        print("\n".join([f"\n{heading.name}:", *lines]))
    if declared.epilog:
        print("\n" + reflowed(declared.epilog))


def _label(own: Any) -> str:
    """An option's names, short ones first, with its opposite and what its value is; an argument's name."""
    names = sorted(own.names, key=lambda name: (name in own.negatives, name.startswith("--")))
    return " ".join(filter(None, [", ".join(names), own.parameter.metavar]))


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
