"""Observed activations: for each value a small histogram, what was observed, and the range chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.compiler.report.markup import Markup, cut, number, percent, section, table, text
from qcompile.compiler.results.errors import ActivationRange

# Units of one SVG, which is scaled to its card.
_WIDTH, _HEIGHT, _PAD = 240, 70, 4
_BINS = 60  # more are joined
# Values drawn; the rest is in a table. 300 drawings are 300 KB.
DRAWN = 300


def clipped_share(observed: ActivationRange) -> float | None:
    """Share of the counted numbers outside [low, high]; of a bin that the range cuts, the part outside.

    None without counts, or where the range is not finite.
    """
    total = sum(observed.counts)
    if not total or not math.isfinite(observed.low) or not math.isfinite(observed.high):
        return None
    bins = zip(observed.counts, observed.edges, observed.edges[1:], strict=False)
    return sum(count * _outside(a, b, observed.low, observed.high) for count, a, b in bins if count) / total


def _outside(a: float, b: float, low: float, high: float) -> float:
    """The part of the bin [a, b] that is not in [low, high]."""
    if b <= a:
        return float(not low <= a <= high)
    return 1 - max(0.0, min(b, high) - max(a, low)) / (b - a)


def ranges(observed: Sequence[ActivationRange]) -> Markup:
    """Cards, the values with the largest clipped share first; what does not fit in a table."""
    shares = [(clipped_share(r), r) for r in observed]
    shares.sort(key=lambda pair: (-(pair[0] if pair[0] is not None else -1), pair[1].value))
    cards = "".join(_card(share, r) for share, r in shares[:DRAWN])
    note = (
        "<p>What calibration saw of each value (histogram, logarithmic counts), and the range that its codes span (the "
        "two lines); numbers in the shaded parts are clipped. Those that lose most come first.</p>\n"
    )
    sort = (
        '<p class="js"><label>Sort by <select data-cards="ranges-drawn"><option value="clip">clipped share'
        '<option value="name">name</select></label></p>\n'
    )
    rest = shares[DRAWN:]
    columns = ["Value", "Observer", "Observed", "Range", "Clipped"]
    listed = table(f"{len(rest):,} values that lose less", columns, (_row(*pair) for pair in rest), numbers=3)
    drawn = f'{note}{sort}<div id="ranges-drawn" class="cards">\n{cards}</div>\n'
    return section("ranges", "Activation ranges", Markup(drawn), listed if rest else "")


def _row(share: float | None, r: ActivationRange) -> list[object]:
    return [r.value, r.observer, _interval(r.observed_low, r.observed_high), _interval(r.low, r.high), percent(share)]


def _interval(low: float, high: float) -> str:
    return f"{number(low)} … {number(high)}".replace("-", "−")


def _card(share: float | None, r: ActivationRange) -> str:
    label = f"{cut(r.value, 60)}: observed {_interval(r.observed_low, r.observed_high)}"
    lost = "not counted" if share is None else f"{percent(share)} clipped"
    return (
        f'<figure data-clip="{-1 if share is None else share:.3g}"><figcaption>{text(r.value, 90)}</figcaption>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(label)}">{_drawing(r)}</svg>\n'
        f"<dl><dt>observed<dd>{_interval(r.observed_low, r.observed_high)}<dt>range<dd>{_interval(r.low, r.high)}"
        f"<dt>{text(r.observer)}<dd>{lost}</dl></figure>\n"
    )


@dataclass(frozen=True)
class _Axis:
    """From numbers to units of the SVG."""

    low: float
    high: float

    def x(self, value: float) -> float:
        """Where a number lies; those that are not finite or off the axis at its ends."""
        share = (value - self.low) / (self.high - self.low)
        return _PAD + (_WIDTH - 2 * _PAD) * (min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.5)


def _drawing(r: ActivationRange) -> str:
    ends = [v for v in (r.low, r.high, r.observed_low, r.observed_high, *r.edges) if math.isfinite(v)]
    if not ends or not math.isfinite(max(ends) - min(ends)):
        return ""
    axis, base = _Axis(min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1), _HEIGHT - 8
    low, high, first, last = (axis.x(v) for v in (r.low, r.high, r.observed_low, r.observed_high))
    shaded = "".join(
        f'<rect class="clip" x="{x:.1f}" width="{end - x:.1f}" height="{base}"/>'
        for x, end in ((_PAD, low), (high, _WIDTH - _PAD))
        if end > x
    )
    seen = f'<path class="seen" d="M{first:.1f} {base + 3}H{last:.1f}M{first:.1f} {base}v6M{last:.1f} {base}v6"/>'
    return f'{shaded}{_histogram(r, axis, base)}{seen}<path class="range" d="M{low:.1f} 0V{base}M{high:.1f} 0V{base}"/>'


def _histogram(r: ActivationRange, axis: _Axis, base: int) -> str:
    """Steps of height log(1 + count), neighbours joined until they fit."""
    if not any(r.counts):
        return ""
    step = -(-len(r.counts) // _BINS)
    counts = [sum(r.counts[i : i + step]) for i in range(0, len(r.counts), step)]
    ends = [*r.edges[step:-1:step], r.edges[-1]]
    top = math.log1p(max(counts))
    steps = (
        f"V{base - (base - 6) * math.log1p(count) / top:.0f}H{axis.x(end):.1f}"
        for count, end in zip(counts, ends, strict=True)
    )
    return f'<path class="counts" d="M{axis.x(r.edges[0]):.1f} {base}{"".join(steps)}V{base}z"/>'
