"""The error of every node as a bar, in graph order, on a logarithmic axis: an inline SVG."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcompile.compiler.report.markup import Markup, cut, number, section, text
from qcompile.compiler.report.nodes import KINDS, NodeRow

# Units of the SVG, which are CSS pixels.
TOP, HEIGHT, AXIS, _WIDTH = 12, 220, 48, 1060
_STUB = 3  # what a node without an error, or with one of zero, is drawn as
_WIDEST, _NARROWEST = 48, 4  # of one node
_NAMED = 40  # as many nodes have their names below the bars
_DECADES = 8


@dataclass(frozen=True)
class Scale:
    """Powers of ten at the bottom and at the top of a chart."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Scale | None":
        """For values of which some are positive and finite; None where none is."""
        known = [value for value in values if math.isfinite(value) and value > 0]
        if not known:
            return None
        low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        return cls(max(min(low, high - 1), high - _DECADES), high)

    def y(self, value: float) -> float:
        """Where a positive value lies; at least a stub above the bottom."""
        share = (self.high - math.log10(value)) / (self.high - self.low)
        return TOP + min(HEIGHT * share, HEIGHT - _STUB)


def chart(rows: Sequence[NodeRow]) -> Markup:
    """The bars of all nodes, their legend, and points for what int8 activations would add."""
    scale = _scale(rows)
    if scale is None:
        return section("errors", "Error by node", Markup("<p>No error of a node was measured.</p>"))
    named = len(rows) <= _NAMED
    beside, below = (90, 130) if named else (0, 22)  # room for names, which lean to the right
    pitch = max(_NARROWEST, min(_WIDEST, (_WIDTH - beside) // len(rows)))
    width, height = pitch * len(rows) + beside, TOP + HEIGHT + below
    drawn = "".join((*grid(scale, width), *_bars(rows, scale, pitch), *_points(rows, scale, pitch)))
    labels = "".join(_names(rows, pitch) if named else _ticks(rows, pitch))
    hits = "".join(_hit(row, pitch) for row in rows)
    return section("errors", "Error by node", _legend(rows), Markup(
        '<div class="plot" tabindex="0" role="region" aria-label="Error by node, scrolls sideways">'
        f'<svg class="axis" width="{AXIS}" height="{height}" aria-hidden="true">{"".join(decades(scale))}</svg>'
        f'<svg width="{width}" height="{height}" role="img" aria-label="Relative error of {len(rows)} nodes, '
        f'logarithmic; the table of nodes has the figures">{drawn}<g class="hit">\n{hits}</g>{labels}</svg></div>\n'
    ))  # fmt: skip


def _scale(rows: Sequence[NodeRow]) -> Scale | None:
    errors = [row.error for row in rows if row.error is not None]
    return Scale.of(v for e in errors for v in (e.error, e.int8_error) if v is not None)


def _positive(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None


def grid(scale: Scale, width: int) -> Iterator[str]:
    """A line at each power of ten."""
    lines = "".join(f"M0 {_y(scale, power):.0f}.5h{width}" for power in range(scale.low, scale.high + 1))
    yield f'<path class="grid" d="{lines}"/>'


def decades(scale: Scale) -> Iterator[str]:
    """What stands beside the lines."""
    for power in range(scale.low, scale.high + 1):
        label = f"{10.0**power:g}" if -5 < power < 5 else f"1e{power}"
        yield f'<text x="{AXIS - 6}" y="{_y(scale, power) + 4:.0f}" text-anchor="end">{label}</text>'


def _y(scale: Scale, power: int) -> float:
    return TOP + HEIGHT * (scale.high - power) / (scale.high - scale.low)


def _bars(rows: Sequence[NodeRow], scale: Scale, pitch: int) -> Iterator[str]:
    """One path for each kind: 5,000 bars are drawn as five elements."""
    bottom, bar = TOP + HEIGHT, max(pitch - max(1, pitch // 5), 1)
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(rows):
        value = _positive(row.error.error) if row.error is not None else None
        top = bottom - _STUB if value is None else scale.y(value)
        paths.setdefault(row.kind, []).append(f"M{i * pitch} {bottom}V{top:.0f}h{bar}V{bottom}z")
    for kind, parts in paths.items():
        yield f'<path class="k-{kind}" d="{"".join(parts)}"/>'


def _points(rows: Sequence[NodeRow], scale: Scale, pitch: int) -> Iterator[str]:
    """What int8 activations would add: filled where they were chosen, else open. A line of no length is a dot."""
    for bits, name in ((16, "open"), (8, "taken")):
        parts = [
            f"M{i * pitch + (pitch - 1) // 2} {scale.y(value):.0f}h0"
            for i, row in enumerate(rows)
            if row.error is not None and row.error.activation_bits == bits
            if (value := _positive(row.error.int8_error)) is not None
        ]
        if parts:
            drawn = "".join(parts)
            size = 7 if pitch > 8 else 4
            yield f'<path class="rim" d="{drawn}" stroke-width="{size + 2}"/>'
            yield f'<path class="{name}" d="{drawn}" stroke-width="{size}"/>'
            if name == "open":
                yield f'<path class="hole" d="{drawn}" stroke-width="{size - 3}"/>'


def _hit(row: NodeRow, pitch: int) -> str:
    """A transparent strip of full height: short bars can be pointed at, too."""
    lines = [f"#{row.number} {cut(row.decision.node, 100)}", row.decision.told]
    if row.error is not None:
        error, added = row.error.error, row.error.int8_error
        lines.append(f"error {number(error)}" + (f", int8 adds {number(added)}" if added is not None else ""))
        lines.append(f"activations {row.rounding}")
    told = "\n".join(text(line) for line in lines)
    x = (row.number - 1) * pitch
    return f'<path d="M{x} 0h{pitch}v{TOP + HEIGHT}h-{pitch}z"><title>{told}</title></path>\n'


def _names(rows: Sequence[NodeRow], pitch: int) -> Iterator[str]:
    y = TOP + HEIGHT + 12
    for i, row in enumerate(rows):
        x = i * pitch + pitch // 2 - 3
        yield f'<text transform="translate({x} {y}) rotate(50)">{text(_tail(row.decision.node))}</text>'


def _tail(name: str) -> str:
    """The last 22 characters, which tell nodes of one model apart."""
    return name if len(name) <= 22 else f"…{name[-21:]}"


def _ticks(rows: Sequence[NodeRow], pitch: int) -> Iterator[str]:
    """Numbers of nodes, as in the table, at least 60 pixels apart."""
    step = next(n for n in (1, 2, 5, 10, 20, 50) if n * pitch >= 60)
    for i in range(step - 1, len(rows), step):
        yield f'<text x="{i * pitch + pitch // 2}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{i + 1}</text>'


def _legend(rows: Sequence[NodeRow]) -> Markup:
    present = {row.kind for row in rows}
    items = [f'<li><i class="k-{kind}"></i>{told}' for kind, told in KINDS.items() if kind in present]
    measured = {r.error.activation_bits: r.rounding for r in rows if r.error and r.error.int8_error is not None}
    told = {8: ("taken", "added by int8 activations"), 16: ("open", f"would be added; {measured.get(16)} kept")}
    items += [f'<li><i class="dot {told[bits][0]}"></i>{told[bits][1]}' for bits in (8, 16) if bits in measured]
    return Markup(
        "<p>Relative error of each quantized node by itself. A stub at the bottom: no error was measured.</p>"
        f'<ul class="legend">{"".join(items)}</ul>\n'
    )
