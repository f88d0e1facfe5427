"""The page's first part: the nodes that hurt most, and commands to paste."""

from qcompile.compiler.console.numbers import percent
from qcompile.compiler.report.advice import hurting, remedies
from qcompile.compiler.report.markup import Markup, number, section, table, text
from qcompile.compiler.results.report import Report

_LONGEST = 4000


def hurts(report: Report) -> Markup | None:
    """The ranking with what to do about it; None where no error of a node was measured."""
    worst = hurting(report)
    if not worst:
        return None
    rows = [[str(own.rank), own.node, own.told, number(own.error), percent(own.share)] for own in worst]
    columns = ["Rank", "Node", "Decision", "Error", "Share"]
    made = table("Nodes of the largest errors, and their shares of all squared errors", columns, rows, numbers=2)
    tried = "".join(
        f"<dt>{text(own.what, 400)}</dt><dd><pre>{text(own.command, _LONGEST)}</pre></dd>\n" for own in remedies(report)
    )
    return section("most", "What hurts most", made, Markup(f"<p>What to try:</p><dl>{tried}</dl>\n" if tried else ""))
