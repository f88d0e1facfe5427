"""Accuracy against bits per weight as a picture; the only module that uses matplotlib, and only when it draws."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.sweep.labels import FONT, Point, label_ends, label_points
from qcompile.compiler.sweep.rows import Row, Sweep, name, word

# Okabe and Ito's colours, which colour-blind readers tell apart. Symmetric lines are broken, their markers hollow:
# with the names behind the lines, that is enough in black and white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_STYLES = (("-", (0, (5, 2))), ((0, (8, 1.5, 1, 1.5)), (0, (1, 1.2))))  # by colour, odd or even; by symmetry
_MARKERS = "osD^vPX*"
# A disc behind the marker of every row on the Pareto front.
_FRONT = {"marker": "o", "markersize": 15, "color": "0.85", "linestyle": "none", "markeredgewidth": 0, "zorder": 1}
# What a logarithmic axis shows of an error of 0.
_SMALLEST = 1e-9
# Inches, and letters in a line of the caption and of the title.
_WIDTH, _HEIGHT, _LETTERS, _TITLE = 9, 5.2, 140, 85
_SETTINGS = {
    "svg.hashsalt": "qcompile",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Series:
    """Rows that differ in bits, group size and weight format only. lines: by bits, from few bits per weight to many."""

    label: str
    color: str
    style: Any
    hollow: bool
    lines: dict[str, list[Row]]


def draw(sweep: Sweep) -> dict[str, bytes]:
    """The plot as bytes by kind, svg and png: a panel for each number of bits, a line for each series.

    Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    made = {}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        _panels(figure, sweep)
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=160, metadata=metadata)
            made[kind] = content.getvalue()
    return made


def series(sweep: Sweep) -> list[Series]:
    """The rows with figures, one series for each choice of the other settings: passes first, symmetry last."""
    keys = [key for key in sweep.varying if key not in ("bits", "group_size", "weights")]
    keys.sort(key=lambda key: (key == "symmetric", key != "passes"))
    found: dict[str, list[Row]] = {}
    for row in sorted(_drawn(sweep), key=lambda row: row.number):
        found.setdefault(name(row.values, keys), []).append(row)
    colors: dict[str, int] = {}
    return [_series(label, rows, colors) for label, rows in found.items()]


def _series(label: str, rows: Sequence[Row], colors: dict[str, int]) -> Series:
    """Series that differ in symmetry only share a colour."""
    hollow = rows[0].values.get("symmetric") == "yes"
    index = colors.setdefault(label.removesuffix("asymmetric").removesuffix("symmetric"), len(colors))
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.bits_per_weight or 0.0):
        lines.setdefault(row.values.get("bits", ""), []).append(row)
    return Series(label or "all", _COLORS[index % len(_COLORS)], _STYLES[index % 2][hollow], hollow, lines)


def _drawn(sweep: Sweep) -> list[Row]:
    return [row for row in sweep.ordered() if row.bits_per_weight and row.scores]


def _panels(figure: Any, sweep: Sweep) -> None:
    """One for each number of bits, with axes of its own: their errors lie too far apart for one.

    Names behind lines are set when the layout has given everything else its room.
    """
    rows = _drawn(sweep)
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    panels = list(dict.fromkeys(row.values.get("bits", "") for row in rows))
    made, ends = figure.subplots(1, len(panels), squeeze=False)[0], []
    for axes, bits in zip(made, panels, strict=True):
        ends.append(_fill(axes, sweep, bits, sizes))
        if bits:
            axes.set_title(word("bits", bits), loc="left", fontsize=9, weight="bold")
    made[0].set_ylabel(sweep.axis)
    _legend(made[-1], sizes, front=any(row.pareto for row in rows))
    _words(figure, sweep, len(panels))
    figure.get_layout_engine().set(rect=(0, 0, 0.985, 1))  # half of the last number below an axis
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, own, bits in zip(made, ends, panels, strict=True):
        if own and not (_named(sweep) and len(own) == 1):
            label_ends(axes, own)
        if _named(sweep):
            label_points(axes, _names(sweep, bits))


def _fill(axes: Any, sweep: Sweep, bits: str, sizes: Sequence[str]) -> list[tuple[Point, str, str]]:
    """Lines, markers and the Pareto front; (end, name, colour) of each line."""
    axes.set_yscale("log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # powers of ten alone may all lie outside a panel
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    ends: list[tuple[Point, str, str]] = []
    for one in series(sweep):
        for row in one.lines.get(bits, []):
            _mark(axes, _point(sweep, row), row, one, _MARKERS[sizes.index(_size(row)) % len(_MARKERS)])
        rows = one.lines.get(bits, [])
        # Formats are no steps of one thing: the line joins those that no other of the series beats.
        points = [_point(sweep, row) for row in (best(sweep, rows) if _named(sweep) else rows)]
        if points:
            axes.plot(*zip(*points, strict=True), color=one.color, linestyle=one.style, linewidth=1.4)
            ends.append((points[-1], one.label, one.color))
    return ends


def best(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """Of rows from few bits per weight to many, those with less error than all before them."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: _point(sweep, row)):
        if not found or row.scores[sweep.error] < found[-1].scores[sweep.error]:
            found.append(row)
    return found


def _named(sweep: Sweep) -> bool:
    """Whether points have names of their own: those of weight formats."""
    return "weights" in sweep.varying


def _names(sweep: Sweep, bits: str) -> list[tuple[Point, str, str]]:
    """(point, weight format, colour) of every row of a panel."""
    return [
        (_point(sweep, row), row.values["weights"].replace("(group=", " g").removesuffix(")"), one.color)
        for one in series(sweep)
        for row in one.lines.get(bits, [])
    ]


def _mark(axes: Any, point: Point, row: Row, one: Series, marker: str) -> None:
    if row.pareto:
        axes.plot(*point, **_FRONT)
    face = "white" if one.hollow else one.color
    axes.plot(*point, marker=marker, markersize=6, color=one.color, markerfacecolor=face, linestyle="none", zorder=3)


def _legend(axes: Any, sizes: Sequence[str], *, front: bool) -> None:
    """What the markers and the grey discs mean, above the panels."""
    shown = [
        axes.plot([], [], color="0.3", marker=_MARKERS[i % len(_MARKERS)], linestyle="none", label=size)[0]
        for i, size in enumerate(sizes)
        if size
    ]
    if front:
        shown += axes.plot([], [], label="Pareto front", **(_FRONT | {"markersize": 10}))
    axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(shown) or 1, frameon=False,
                fontsize=FONT, handlelength=1.2, handletextpad=0.4, columnspacing=1.0, borderaxespad=0.2)  # fmt: skip


def _words(figure: Any, sweep: Sweep, panels: int) -> None:
    """Title, the axis that all panels share, and caption, in as many lines as they take."""
    path = Path(sweep.model).absolute()
    title = textwrap.fill(f"{path.parent.name}/{path.name}: accuracy against size", _TITLE)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    own = "".join(f", {name} {value:.4g}" for name, value in sweep.float_scores.items())
    apart = "Each panel has a scale of its own. " if panels > 1 else ""
    told = f"Scored on {sweep.source}. {apart}The float model would be at error 0, below the axis{own}. {sweep.note}"
    label = "bits per quantized weight, scales and zero points included"
    figure.supxlabel(f"{label}\n\n{textwrap.fill(told, _LETTERS)}", x=0.01, ha="left", fontsize=FONT, color="0.3")


def _point(sweep: Sweep, row: Row) -> Point:
    return row.bits_per_weight or 0.0, max(row.scores[sweep.error], _SMALLEST)


def _size(row: Row) -> str:
    return word("group_size", row.values["group_size"]) if "group_size" in row.values else ""
