"""Names behind the ends of lines, where no two of them meet."""

import textwrap
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]

FONT = 8  # points
# Letters of a name's line, the share of a point size that a letter is wide, and of a line that is high.
_LETTERS, _WIDE, _HIGH = 22, 0.56, 1.25
_AWAY = 9  # points between the last marker and the names
_DOT, _BESIDE = 4, 9  # points: half a marker, and between a marker and its name


def label_ends(axes: Any, ends: Sequence[tuple[Point, str, str]]) -> None:
    """Write (end, name, colour) in a column right of the last end, near each end's height, and make room for it."""
    names = [wrapped(name) for _, name, _ in ends]
    lines = [line for name in names for line in name.split("\n")]
    taken = max(map(len, lines)) * _WIDE * FONT + _AWAY + 4
    (low, high), last = axes.get_xlim(), max(x for (x, _), _, _ in ends)
    width = 72 * axes.figure.get_size_inches()[0] * axes.get_position().width
    axes.set_xlim(low, max(high, low + (last - low) / max(1 - taken / width, 0.2)))
    axes.autoscale(enable=False)
    points = axes.figure.dpi / 72  # pixels in a point
    own = [float(axes.transData.transform(point)[1]) / points for point, _, _ in ends]
    gap = _HIGH * FONT * max(name.count("\n") + 1 for name in names)
    bottom, top = (edge / points for edge in axes.get_window_extent().get_points()[:, 1])
    heights = within(spread(own, gap), gap, bottom + gap / 2, top - gap / 2)
    for ((_, y), _, color), name, start, height in zip(ends, names, own, heights, strict=True):
        axes.annotate(
            name,
            (last, y),
            (_AWAY, height - start),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            color=color,
        )


def label_points(axes: Any, points: Sequence[tuple[Point, str, str]]) -> None:
    """Write (point, name, colour) beside each point, at the first of a few places where no other name or point is."""
    dot, high = axes.figure.dpi / 72, _HIGH * FONT
    at = [axes.transData.transform(point) / dot for point, _, _ in points]
    taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in at]
    taken += [tuple(text.get_window_extent().extents / dot) for text in axes.texts]
    left, right = axes.get_window_extent().get_points()[:, 0] / dot
    for (x, y), (point, name, color) in zip(at, points, strict=True):
        wide = len(name) * _WIDE * FONT
        # Lines fall to the right: above them is room.
        places = [(x + _BESIDE - 2, y + 7), (x + _BESIDE, y), (x - _BESIDE - wide, y), (x - _BESIDE - wide, y - 7)]
        places += [(x - wide / 2, y + _BESIDE + 3), (x - wide / 2, y - _BESIDE - 3)]
        places += [(x + _BESIDE, y + step * high) for step in (1, -1, 2, -2)]
        boxes = [(a, b - high / 2, a + wide, b + high / 2) for a, b in places]
        free = (
            box for box in boxes if left <= box[0] and box[2] <= right and not any(_meet(box, own) for own in taken)
        )
        box = next(free, boxes[0])
        taken.append(box)
        axes.annotate(
            name,
            point,
            (box[0] - x, box[1] + high / 2 - y),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            color=color,
        )


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def wrapped(name: str) -> str:
    """A name in lines that end at a space or behind a comma."""
    lines = textwrap.wrap(name.replace(",", ", "), _LETTERS, break_long_words=False)
    return "\n".join(line.replace(", ", ",") for line in lines)


def within(placed: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, moved between two ends, the upper one first where there is no room for all."""
    found, order = list(placed), sorted(range(len(placed)), key=lambda index: placed[index])
    for step, index in enumerate(order):
        found[index] = max(found[index], low + gap * step)
    for step, index in enumerate(reversed(order)):
        found[index] = min(found[index], high - gap * step)
    return found


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
