"""Accuracy against bits per weight as a picture; the only module that uses matplotlib, and only when it draws."""

import importlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.compiler.sweep_rows import Row, Sweep, name, word

# Okabe and Ito's colours, which colour-blind readers tell apart. Symmetric lines are broken, their markers hollow:
# with the names behind the lines, that is enough in black and white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_STYLES = (("-", (0, (5, 2))), ((0, (8, 1.5, 1, 1.5)), (0, (1, 1.2))))  # by colour, odd or even; by symmetry
_MARKERS = "osD^vPX*"
# What a logarithmic axis shows of an error of 0.
_SMALLEST = 1e-9
_SETTINGS = {
    "svg.hashsalt": "qcompile",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# A disc behind the marker of every row on the Pareto front.
_FRONT = {"marker": "o", "markersize": 15, "color": "0.85", "linestyle": "none", "markeredgewidth": 0, "zorder": 1}
_FONT, _LABEL_GAP = 8, 1.25  # points; lines of text between two labels' middles

Point = tuple[float, float]


def draw(sweep: Sweep) -> dict[str, bytes]:
    """The plot as bytes by kind, svg and png: a line for each series and number of bits, a marker for each group size.

    Raises ModuleNotFoundError without matplotlib.
    """
    # By name: matplotlib is an extra, and the fixed list of what compiler/ may import stays as it is.
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    made = {}
    with matplotlib.rc_context(_SETTINGS):
        figure = figures.Figure(figsize=(8, 5.4), layout=None)
        axes = figure.add_axes((0.09, 0.18, 0.88, 0.66))
        _fill(axes, sweep)
        _words(figure, axes, sweep)
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=160, metadata=metadata)
            made[kind] = content.getvalue()
    return made


def series(sweep: Sweep) -> dict[str, list[list[Row]]]:
    """Rows by the settings beside bits and group size, in a few words; each a list of lines, one for each bits.

    A line goes from few bits per weight to many.
    """
    keys = _series_keys(sweep)
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sweep.done:
        if row.bits_per_weight:
            label = name(row.values, keys) or "all"
            found.setdefault(label, {}).setdefault(row.values.get("bits", ""), []).append(row)
    return {
        label: [sorted(line, key=lambda row: row.bits_per_weight or 0.0) for line in lines.values()]
        for label, lines in found.items()
    }


def _series_keys(sweep: Sweep) -> list[str]:
    """The settings that make a series: the passes first, symmetry last."""
    keys = [key for key in sweep.varying if key not in ("bits", "group_size")]
    return sorted(keys, key=lambda key: (key == "symmetric", key != "passes"))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near to the wanted ones as can be, in their order, at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # Runs of positions that touch, each (sum of where its members would put its start, members).
    runs: list[tuple[float, int]] = []
    for index in order:
        runs.append((wanted[index], 1))
        while len(runs) > 1 and runs[-2][0] / runs[-2][1] + gap * runs[-2][1] > runs[-1][0] / runs[-1][1]:
            (total, count), (before, members) = runs.pop(), runs.pop()
            runs.append((before + total - gap * members * count, members + count))
    placed = [total / count + gap * step for total, count in runs for step in range(count)]
    return [placed[order.index(index)] for index in range(len(wanted))]


def _fill(axes: Any, sweep: Sweep) -> None:
    """Lines, markers, the Pareto front, and the labels behind each line's end."""
    axes.set_yscale("log")
    front = sorted(_point(sweep, row) for row in sweep.done if row.pareto)
    if front:
        axes.plot(*zip(*front, strict=True), **_FRONT)
    sizes = list(dict.fromkeys(_size(row) for row in sorted(sweep.done, key=lambda r: r.bits_per_weight or 0.0)))
    ends: list[tuple[Point, str, str]] = []
    colors: dict[str, int] = {}
    for label, lines in series(sweep).items():
        hollow = lines[0][0].values.get("symmetric") == "yes"
        index = colors.setdefault(label.removesuffix("asymmetric").removesuffix("symmetric"), len(colors))
        color, style = _COLORS[index % len(_COLORS)], _STYLES[index % 2][hollow]
        for line in lines:
            points = [_point(sweep, row) for row in line]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.4)
            for row, point in zip(line, points, strict=True):
                _mark(axes, point, _MARKERS[sizes.index(_size(row)) % len(_MARKERS)], color, hollow=hollow)
            ends.append((points[-1], label, color))
    _label(axes, ends)
    _legend(axes, sizes, bool(front))


def _mark(axes: Any, point: Point, marker: str, color: str, *, hollow: bool) -> None:
    face = "white" if hollow else color
    axes.plot(*point, marker=marker, markersize=6, color=color, markerfacecolor=face, linestyle="none", zorder=3)


def _label(axes: Any, ends: Sequence[tuple[Point, str, str]]) -> None:
    """Every line's name behind its end, moved up or down where names would meet, with room on the right."""
    low, high = axes.get_xlim()
    width = axes.figure.get_size_inches()[0] * axes.get_position().width * 72
    letters = max(len(label) for _, label, _ in ends) * 0.56 * _FONT + 12  # points that the longest name takes
    last = max(x for (x, _), _, _ in ends)
    axes.set_xlim(low, max(high, low + (last - low) / max(1 - letters / width, 0.2)))
    axes.autoscale(enable=False)
    points = axes.figure.dpi / 72  # pixels in a point
    pixels = [axes.transData.transform(point) for point, _, _ in ends]
    heights = _heights([tuple(p) for p in pixels], letters * points, _LABEL_GAP * _FONT * points)
    for (point, label, color), (_, own), height in zip(ends, pixels, heights, strict=True):
        axes.annotate(
            label, point, (9, (height - own) / points), textcoords="offset points", va="center", fontsize=_FONT,
            color=color, bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip


def _heights(pixels: Sequence[Point], width: float, gap: float) -> list[float]:
    """Heights of names that begin at the points: those whose widths overlap are spread, `gap` apart."""
    heights = [0.0] * len(pixels)
    order = sorted(range(len(pixels)), key=lambda index: pixels[index][0])
    while order:
        start = pixels[order[0]][0]
        group = [index for index in order if pixels[index][0] < start + width]
        for index, height in zip(group, spread([pixels[i][1] for i in group], gap), strict=True):
            heights[index] = height
        order = [index for index in order if index not in group]
    return heights


def _legend(axes: Any, sizes: Sequence[str], front: bool) -> None:
    """What the markers and the grey discs mean, above the axes."""
    shown = [
        axes.plot([], [], color="0.3", marker=_MARKERS[i % len(_MARKERS)], linestyle="none", label=size)[0]
        for i, size in enumerate(sizes)
        if size
    ]
    if front:
        shown += axes.plot([], [], label="Pareto front", **(_FRONT | {"markersize": 10}))
    axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(shown) or 1, frameon=False,
                fontsize=_FONT, handlelength=1.6, handletextpad=0.5, columnspacing=1.4)  # fmt: skip


def _words(figure: Any, axes: Any, sweep: Sweep) -> None:
    """Title, axes and caption."""
    path = Path(sweep.model).absolute()
    axes.set_xlabel("bits per packed MatMul weight, scales and zero points included")
    axes.set_ylabel(sweep.axis)
    axes.grid(axis="y", which="major", color="0.92")
    axes.set_axisbelow(True)
    left = axes.get_position().x0
    figure.text(left, 0.955, f"{path.parent.name}/{path.name}: accuracy against size", fontsize=11, weight="bold")
    figure.text(left, 0.94, textwrap.fill(f"on {sweep.source}", 125), fontsize=_FONT, color="0.3", va="top")
    own = "".join(f", {name} {value:.4g}" for name, value in sweep.float_scores.items())
    told = f"The float model would be at error 0, below the axis{own}. {sweep.note}"
    figure.text(0.02, 0.085, textwrap.fill(told, 132), fontsize=_FONT, color="0.3", va="top")


def _point(sweep: Sweep, row: Row) -> Point:
    return row.bits_per_weight or 0.0, max(row.scores[sweep.error], _SMALLEST)


def _size(row: Row) -> str:
    return word("group_size", row.values["group_size"]) if "group_size" in row.values else ""
