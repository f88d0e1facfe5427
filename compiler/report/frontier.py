"""What each size of the model was foretold to change: a line of points, an inline SVG, and their figures."""

from collections.abc import Iterator, Sequence

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.report.chart import AXIS, HEIGHT, TOP, Scale, decades, grid
from qcompile.compiler.report.markup import Markup, paragraph, section, table, text
from qcompile.compiler.results.frontier import Frontier, Point, Tried

# Units of the SVG, which are CSS pixels: of the whole, of what is left of both sides and below.
_WIDTH, _SIDE, _BELOW = 860, 40, 24


def frontier(drawn: Frontier) -> Markup:
    """The choices from the smallest to the largest, the one that was taken filled, and what compiles of it measured."""
    within = "the time of its products" if drawn.fastest else "its size"
    told = (
        f"Each point is the choice of formats that is foretold to change least within {within}, from {drawn.windows}. "
        "Of the same model, --budget-file with the report.json beside this page and --point N compile another one."
    )
    heads = ["Point", "", "Size, about", "Bits a weight", *drawn.heads[3:]]
    rows = [[number, mark, *figures] for number, *figures, mark in drawn.rows()]
    timed = drawn.timed()
    parts = [paragraph(told), *map(paragraph, [*([timed] if timed else []), *drawn.lines()]), _chart(drawn)]
    return section("frontier", "Frontier", *parts, table("Points of the frontier", heads, rows, numbers=len(heads) - 2))


def _chart(drawn: Frontier) -> Markup:
    """Nothing where no point changes anything."""
    found = [(_place(drawn, own), own.change) for own in drawn.points]
    measured = [(_place(drawn, own), own.distance) for own in drawn.tried]
    scale = Scale.of(change for _, change in (*found, *measured))
    if scale is None:
        return Markup()
    what, height = "KL" if drawn.metric == "KL" else "relative error", TOP + HEIGHT + _BELOW
    places = "times" if drawn.fastest else "sizes"
    label = text(f"Foretold {what} of {len(found)} {places}, logarithmic; the table has the figures")
    drawing = "".join((*grid(scale, _WIDTH), *_line(drawn, found, measured, scale)))
    legend = f'<li><i class="dot open"></i>{what}, foretold<li><i class="dot taken"></i>chosen'
    legend += '<li><i class="k-skipped"></i>measured on what was held aside' if measured else ""
    return Markup(
        f'<ul class="legend">{legend}</ul>\n'
        '<div class="plot" tabindex="0" role="region" aria-label="Frontier, scrolls sideways">'
        f'<svg class="axis" width="{AXIS}" height="{height}" aria-hidden="true">{"".join(decades(scale))}</svg>'
        f'<svg width="{_WIDTH}" height="{height}" role="img" aria-label="{label}">{drawing}</svg></div>\n'
    )


def _place(drawn: Frontier, own: Point | Tried) -> float:
    """Of a choice on the axis: its size, or the time of its products where points go by that."""
    return own.microseconds or 0.0 if drawn.fastest else own.size


def _line(
    drawn: Frontier, found: Sequence[tuple[float, float]], measured: Sequence[tuple[float, float]], scale: Scale
) -> Iterator[str]:
    """The points and the line through them, their sizes or times below; and squares where something was measured."""
    sizes = [size for size, _ in (*found, *measured)]
    least, span = min(sizes), max(sizes) - min(sizes) or 1

    def x(size: float) -> int:
        return round(_SIDE + (_WIDTH - 2 * _SIDE) * (size - least) / span)

    def y(change: float) -> int:
        return round(scale.y(change)) if change > 0 else TOP + HEIGHT

    yield f'<path class="seen" d="M{"L".join(f"{x(size)} {y(change)}" for size, change in found)}"/>'
    for number, (size, change) in enumerate(found, 1):
        dot, own = f"M{x(size)} {y(change)}h0", drawn.points[number - 1]
        parts = [megabytes(own.size), f"{own.bits:.2f} bits a weight", f"{drawn.told(change)} {drawn.unit}"]
        parts += [f"{drawn.rate(own)} {drawn.rate_unit}"] if drawn.rate_unit else []
        told = text(f"point {number}: {', '.join(parts)}")
        kind = "taken" if number == drawn.chosen else "open"
        hole = f'<path class="hole" d="{dot}" stroke-width="4"/>' if kind == "open" else ""
        yield f'<g><title>{told}</title><path class="{kind}" d="{dot}" stroke-width="8"/>{hole}</g>'
    for (size, change), tried in zip(measured, drawn.tried, strict=True):
        told = text(f"compiled: {megabytes(tried.size)}, {drawn.told(change)} {drawn.unit}")
        yield f'<path class="k-skipped" d="M{x(size) - 4} {y(change) - 4}h8v8h-8z"><title>{told}</title></path>'
    below = TOP + HEIGHT + 16
    for size in dict.fromkeys((min(sizes), max(sizes))):
        label = f"{size:.0f} µs" if drawn.fastest else megabytes(int(size))
        yield f'<text x="{x(size)}" y="{below}" text-anchor="middle">{label}</text>'
