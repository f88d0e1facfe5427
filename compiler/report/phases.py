"""Where the time went: a waterfall of the phases, an inline SVG, and their figures as a table."""

from collections.abc import Iterator, Sequence

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.report.markup import Markup, cut, section, table, text
from qcompile.compiler.results.phases import Phase

# Units of the SVG, which are CSS pixels.
_NAMES, _WIDTH, _ROW, _BAR, _AXIS = 150, 880, 20, 14, 22
_THIN = 1.5  # the least width of a bar


def waterfall(phases: Sequence[Phase]) -> Markup:
    """A row for each phase, from the one that began first; a bar for each stretch of time that it had."""
    end = max((stop for phase in phases for _, stop in phase.spans), default=0.0) or 1.0
    height = _ROW * len(phases)
    drawn = "".join(_row(phase, number, end) for number, phase in enumerate(phases))
    names = "".join(
        f'<text x="{_NAMES - 8}" y="{_ROW * number + 14}" text-anchor="end">{text(cut(phase.name, 22))}</text>'
        for number, phase in enumerate(phases)
    )
    ticks = list(_ticks(end))
    grid = "".join(f"M{_x(at, end):.0f}.5 0v{height}" for at in ticks)
    labels = "".join(
        f'<text x="{_x(at, end):.0f}" y="{height + 16}" text-anchor="middle">{at:g} s</text>' for at in ticks if at
    )
    return section(
        "phases",
        "Phases",
        Markup(
            "<p>Each moment counts for one row. Bytes are those that really went from and to disk; memory is the "
            "largest meanwhile, of which files stand behind what is not its own.</p>"
            '<ul class="legend"><li><i class="k-int4"></i>passes<li><i class="k-kept"></i>all else</ul>\n'
            '<div class="plot" tabindex="0" role="region" aria-label="Phases over time, scrolls sideways">'
            f'<svg class="axis" width="{_NAMES}" height="{height + _AXIS}" aria-hidden="true">{names}</svg>'
            f'<svg width="{_WIDTH + 30}" height="{height + _AXIS}" role="img" aria-label="When each of {len(phases)} '
            f'phases ran; the table has the figures"><path class="grid" d="{grid}"/>{drawn}{labels}</svg></div>\n'
        ),
        _table(phases),
    )


def _x(at: float, end: float) -> float:
    return _WIDTH * at / end


def _row(phase: Phase, number: int, end: float) -> str:
    """One path, however many stretches."""
    y = _ROW * number + (_ROW - _BAR) // 2
    parts = (
        f"M{_x(a, end):.1f} {y}h{max(_x(b, end) - _x(a, end), _THIN):.1f}v{_BAR}H{_x(a, end):.1f}z"
        for a, b in phase.spans
    )
    told = text(f"{phase.name}: {phase.seconds:.2f} s")
    return f'<path class="k-{"int4" if phase.of_pass else "kept"}" d="{"".join(parts)}"><title>{told}</title></path>'


def _ticks(end: float) -> Iterator[float]:
    """Round numbers of seconds, four to ten of them."""
    step = 10.0**-3
    while end / step > 10:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    count = 0
    while count * step <= end:
        yield count * step
        count += 1


def _table(phases: Sequence[Phase]) -> Markup:
    rows = [
        [
            phase.name,
            "pass" if phase.of_pass else "",
            f"{phase.seconds:.2f}",
            f"{phase.cpu:.2f}",
            megabytes(phase.read),
            megabytes(phase.written),
            megabytes(phase.memory),
            megabytes(phase.anonymous),
        ]
        for phase in phases
    ]
    columns = ["Phase", "", "Seconds", "CPU seconds", "Read", "Written", "Memory", "Its own"]
    return table("Phases", columns, rows, numbers=6, name="phase-list")
