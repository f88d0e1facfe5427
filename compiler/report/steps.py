"""What was chosen by measuring finished models: nodes kept in float, and the steps without data."""

from qcompile.compiler.console.numbers import decibels
from qcompile.compiler.report.markup import Markup, number, paragraph, section, table
from qcompile.compiler.results.ladder import Ladder
from qcompile.compiler.results.mixed import Mixed
from qcompile.compiler.results.report import Report


def steps(report: Report) -> dict[str, Markup]:
    """The parts of the page, by title; none where nothing was chosen so."""
    parts = {}
    if report.mixed is not None:
        parts["Mixed precision"] = _mixed(report.mixed)
    if report.ladder is not None:
        parts["Without data"] = _ladder(report.ladder)
    return parts


def _mixed(mixed: Mixed) -> Markup:
    rows = [[str(k.rank), k.node, "int8" if k.weights_only else "float", k.effect] for k in mixed.kept]
    columns = ["Rank", "Node", "Weight", "Effect of it alone in integers"]
    made = table("Nodes with float activations, the worst first", columns, rows)
    ends = [number(d) if mixed.metric == "KL" else f"{decibels(d):.1f} dB" for d in (mixed.before, mixed.after)]
    told = f"{mixed.metric} {ends[0]} with none of {mixed.nodes} nodes kept, {ends[1]} with these, on {mixed.windows}."
    held = f"{mixed.metric} {mixed.told(mixed.held)} on {mixed.held_on}." if mixed.held is not None else ""
    return section("precision", "Mixed precision", paragraph(told), *([paragraph(held)] if held else []), made)


def _ladder(ladder: Ladder) -> Markup:
    rows = [[rung.name, " → ".join(rung.passes), words] for rung, words in ladder.steps()]
    made = table("Each step, finished and measured", ["Statistics from", "Passes", "Distance from float"], rows)
    told = f"Measured on {ladder.windows}. The last step is what was written."
    return section(
        "data", "Without data", paragraph(told), made, *([paragraph(ladder.advice)] if ladder.advice else [])
    )
