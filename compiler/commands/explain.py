"""`qcompile explain`: why a node of a compiled model got what it got."""

from qcompile.compiler.commands.declared.explain import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import console
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.report.explanation import explain

_WORST = 10


def run(args: Options) -> Document:
    """Print what the report says of the nodes."""
    worst = _WORST if args.worst is None and not args.nodes else args.worst
    found = explain(model_file(args.model), args.nodes, worst)
    found.sheet().show(console(answer=True))
    return found.to_dict()
