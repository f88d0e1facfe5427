"""The nodes with weights: what became of each, its error, its place in the graph; counted, and as a list."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.report.markup import Markup, number, percent, search, section, table, text
from qcompile.compiler.report.tied import Tied
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.results.report import Report
from qcompile.passes.base import STATIC, Decision
from qcompile.passes.formats import named

# What became of a node: the class of its colour (style.py) and what the legend says.
KINDS = {
    **{f"int{bits}": f"{bits}-bit weights" for bits in (2, 3, 4, 5, 6, 8)},
    "static": "static int8",
    "kept": "float, as asked for",
    "skipped": "float, no format",
}


@dataclass(frozen=True)
class NodeRow:
    """A node with weights, in graph order. kind: of KINDS. counted, size: weights and bytes by `Tied`.

    rounding: what is done to its activations (`Report.roundings`); empty where that is not known.
    """

    number: int
    decision: Decision
    kind: str
    counted: int
    size: int | None
    error: NodeError | None
    rounding: str = ""

    @property
    def operator(self) -> str:
        """The operator of the source model."""
        return str(self.decision.detail.get("kind", ""))

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return int(self.decision.detail.get("weights", 0))


def node_rows(report: Report) -> list[NodeRow]:
    """All nodes that a pass that quantizes decided on.

    Case 1: several passes decided on one node: what quantized it counts, else the first.
    Case 2: a node was measured without a decision, as in a report put together by hand: it counts as 8-bit.
    Case 3: an earlier node reads the same weight: it counts there, and its bytes where they are the same (`Tied`).
    Case 4: a node reads several constants that no format is for: each is a row.
    """
    errors = {error.node: error for error in report.nodes}
    found: dict[object, Decision] = {}
    for decision in _deciding(report):
        key: object = decision.node or len(found)  # nodes without a name stay apart
        if key in found and decision.action == found[key].action == "skipped":  # Case 4
            key = (decision.node, decision.detail.get("weight"))
        if key not in found or decision.action == "quantized":  # Case 1
            found[key] = decision
    for error in report.nodes:  # Case 2
        found.setdefault(error.node, Decision(error.node, "quantized", "quantized", {"weights": error.weights}))
    tied = Tied()
    return [
        NodeRow(
            i,
            decision,
            _kind(decision),
            tied.weights(decision),
            tied.nbytes(decision),
            error,
            _rounding(report, error),
        )
        for i, decision in enumerate(found.values(), 1)
        for error in (errors.get(decision.node),)
    ]


def _rounding(report: Report, error: NodeError | None) -> str:
    return "" if error is None else report.roundings.get(error.activation_bits, f"{error.activation_bits} bit")


def _deciding(report: Report) -> Iterator[Decision]:
    for name, decisions in report.decisions.items():
        if name in report.quantizers or any(d.action == "quantized" for d in decisions):
            yield from decisions


def _kind(decision: Decision) -> str:
    if decision.action != "quantized":
        return "kept" if decision.action == "kept" else "skipped"
    if decision.format == STATIC:
        return "static"
    return f"int{named(decision.format).bits}" if decision.format else "int8"


def coverage(report: Report, rows: Sequence[NodeRow]) -> Markup:
    """Nodes counted by operator and decision, with the weights behind them, as the terminal shows them."""
    groups: dict[tuple[str, str], list[NodeRow]] = {}
    for row in rows:
        groups.setdefault((row.operator, row.decision.group), []).append(row)
    told = f"{report.told[0].upper()}{report.told[1:]}."
    made = table("Nodes by decision", ["Decision", "Operator", "Nodes", "Weights", "Stored"],
        [_group(group) for group in groups.values()], numbers=3)  # fmt: skip
    return section("coverage", "Coverage", Markup(f"<p>{told}</p>\n"), _shares(rows), made if rows else "")


def _group(rows: Sequence[NodeRow]) -> list[object]:
    weights, size = sum(row.counted for row in rows), sum(row.size or 0 for row in rows)
    stored = megabytes(size) if size else "shared" if all(row.size is None for row in rows) else "–"
    return [
        swatch(rows[0], rows[0].decision.group),
        rows[0].operator,
        f"{len(rows):,}",
        f"{weights:,}" if weights else "–",
        stored,
    ]


def _shares(rows: Sequence[NodeRow]) -> Markup:
    """One bar of 1000 units: the share of all weights that went each way."""
    weights = {kind: sum(r.counted for r in rows if r.kind == kind) for kind in KINDS}
    total, x, parts = sum(weights.values()), 0.0, []
    for kind, count in weights.items():
        if count:
            width = 1000 * count / total
            told = f"{KINDS[kind]}: {count:,} weights, {percent(count / total)}"
            parts.append(
                f'<rect class="k-{kind}" x="{x:.1f}" width="{width:.1f}" height="14"><title>{told}</title></rect>'
            )
            x += width
    label = "share of the weights by decision"
    drawn = f'<svg class="shares" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return Markup(f"{drawn}{''.join(parts)}</svg>\n" if parts else "")


def swatch(row: NodeRow, told: str) -> Markup:
    """What is told of a decision behind a square of its colour."""
    return Markup(f'<i class="k-{row.kind}"></i>{text(told)}')


def node_list(rows: Sequence[NodeRow]) -> Markup:
    """Every node: a table to sort and to filter."""
    columns = ["#", "Node", "Operator", "Decision", "Weights", "Bits", "Error", "Int8 adds", "Activations"]
    made = table(f"All {len(rows):,} nodes with weights, in graph order", columns, map(_cells, rows),
        numbers=5, name="all-nodes")  # fmt: skip
    note = Markup(
        "<p>Error: ‖y - x W‖ / ‖x W‖ on the check batches, W the float weight. Int8 adds: what rounding the "
        "activations to int8 would add to that, where it was measured. Activations: the bits chosen for a kernel, or "
        "the accuracy level of MatMulNBits. Long names are cut in the middle; the JSON report has them whole.</p>\n"
    )
    return section("nodes", "Nodes", note, search("all-nodes", "name, operator, decision"), made)


def _cells(row: NodeRow) -> list[object]:
    error = row.error
    measured = ["–", "–", "–"] if error is None else [
        number(error.error), number(error.int8_error), row.rounding
    ]  # fmt: skip
    bits = number(row.decision.detail.get("bits_per_weight"))
    weights = f"{row.weights:,}" if row.weights else "–"
    return [str(row.number), row.decision.node, row.operator, swatch(row, row.decision.told), weights, bits, *measured]
