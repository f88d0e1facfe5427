"""Pieces of HTML: whatever is not Markup is escaped and cut on its way in."""

import html
import math
from collections.abc import Iterable, Sequence

from qcompile.compiler.console.visible import visible

# Names longer than this many characters lose their middle; the whole name is in the JSON report.
LONGEST = 160


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object, longest: int = LONGEST) -> Markup:
    """A value as HTML: at most `longest` characters before escaping, unprintable ones (also U+202E) as \\uXXXX."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(visible(cut(str(value), longest))))


def cut(name: str, longest: int) -> str:
    """A name without its middle where it is longer; more of the tail stays, as that tells nodes apart."""
    if len(name) <= longest:
        return name
    head = longest // 3
    return f"{name[:head]}…{name[head + 1 - longest :]}"


def number(value: float | None) -> str:
    """Three digits; a dash where nothing was measured; "nan" and "inf" as they are."""
    return "–" if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in percent: "99.98%" is not rounded to "100.0%", nor "0.001%" to "0%"."""
    if share is None or not math.isfinite(share):
        return number(share)
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{100 * share:.3g}%" if share < 0.1 else f"{math.floor(1000 * share) / 10:.1f}%"


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other; those that are not Markup are escaped."""
    return Markup("".join(text(part) for part in parts))


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: int = 0, name: str = ""
) -> Markup:
    """A table in a box that scrolls, the last `numbers` columns aligned to the right.

    name: its id in the page; such a table can be sorted, and filtered by a box of `search`. End tags that HTML does not
    ask for are left out: they are a quarter of a table of 5,000 nodes.
    """
    first = len(columns) - numbers
    heads = "".join(f"<th scope=col{_right(i >= first)}>{text(column)}" for i, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(i >= first)}>{text(cell)}" for i, cell in enumerate(row)) + "\n" for row in rows
    )
    named = f' id="{name}"' if name else ""
    label = text(caption)
    return Markup(
        f'<div class="box" tabindex="0" role="region" aria-label="{label}"><table{named}><caption>{label}</caption>'
        f"<thead><tr>{heads}</thead><tbody>\n{body}</tbody></table></div>\n"
    )


def search(name: str, what: str) -> Markup:
    """A box that filters the rows of the table `name`; it shows only where scripts run."""
    return Markup(
        f'<p class="js"><label>Filter <input type="search" data-table="{name}" placeholder="{text(what)}"></label> '
        "<output></output></p>\n"
    )


def details(summary: str, body: str, *, opened: bool = False) -> Markup:
    """A part of the page that opens with a click."""
    return Markup(f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>\n{text(body)}</details>\n")


def section(name: str, title: str, *parts: str) -> Markup:
    """A part of the page under a heading; `name` is where links lead."""
    return Markup(f'<section id="{name}"><h2>{text(title)}</h2>\n{join(parts)}</section>\n')


def paragraph(told: str) -> Markup:
    """One sentence or more."""
    return Markup(f"<p>{text(told, 1000)}</p>\n")


def _right(yes: bool) -> str:
    return " class=n" if yes else ""
