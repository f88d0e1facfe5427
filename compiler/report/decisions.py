"""What each pass decided, and how activations were chosen: parts that open with a click."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qcompile.compiler.report.markup import Markup, cut, details, number, paragraph, percent, section, table
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.results.report import Report
from qcompile.passes.base import Decision

# Rows shown of one pass; the JSON report has all.
SHOWN = 1000
_KEYS = 8  # columns for details of decisions


def decisions(report: Report) -> Markup:
    """Every pass in order. Those of the pass that quantizes are the list of nodes already."""
    parts = [_pass(name, made) for name, made in report.decisions.items() if name not in report.quantizers and made]
    if measured := [node for node in report.nodes if node.int8_error is not None or node.activation_bits == 8]:
        parts.append(_activations(report, measured))
    if report.quantizing:
        parts.append(paragraph(f"The decisions of {report.quantizer} are those in the list of nodes."))
    return section("decisions", "Decisions of each pass", *(parts or [paragraph("No pass made a decision.")]))


def _pass(name: str, made: Sequence[Decision]) -> Markup:
    told = ", ".join(f"{count:,} {action}" for action, count in Counter(d.action for d in made).items())
    keys = list(dict.fromkeys(key for d in made[:SHOWN] for key in d.detail))[:_KEYS]
    rows = [[d.node or "–", d.action, d.reason, *(_value(d.detail.get(key)) for key in keys)] for d in made[:SHOWN]]
    columns = [
        "Node or value",
        "Decision",
        "Reason",
        *(cut(str(key).replace("_", " ").capitalize(), 40) for key in keys),
    ]
    left = len(made) - SHOWN
    more = paragraph(f"{left:,} more are in the JSON report.") if left > 0 else Markup()
    return details(f"{cut(name, 60)}: {told}", Markup(table(f"Decisions of {cut(name, 60)}", columns, rows) + more))


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(own)}" for key, own in value.items())
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)


def _activations(report: Report, measured: Sequence[NodeError]) -> Markup:
    """How many nodes take 8 or 16 bits, and what int8 adds to the squared error of the weights."""
    nodes, roundings = report.nodes, report.roundings
    whole, work = sum(node.error**2 for node in nodes), sum(node.weights for node in nodes)
    rows = []
    for bits in (8, 16):
        chosen = [node for node in nodes if node.activation_bits == bits]
        adds = sum(node.int8_error**2 for node in chosen if node.int8_error is not None)
        share = sum(node.weights for node in chosen) / work if work else None
        rows.append([roundings[bits], f"{len(chosen):,}", percent(share), percent(adds / whole) if whole else "–"])
    columns = ["Activations", "Nodes", "Multiply-adds", "Int8 adds or would add"]
    told = paragraph(
        "Int8 goes to as many multiply-adds as the budget of added squared error allows, as a share of the squared "
        "error of all packed weights, and to products that nothing else is fast for. The list of nodes has the "
        "figures of each."
    )
    count = sum(node.activation_bits == 8 for node in nodes)
    left = len(nodes) - count
    summary = f"activations: {count:,} nodes {roundings[8]}, {left:,} {roundings[16]}, {len(measured):,} measured"
    return details(summary, Markup(table("Bits of activations", columns, rows, numbers=3) + told))
