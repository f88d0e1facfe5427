"""`qcompile diff`: what differs between two models."""

from qcompile.compiler.api.difference import diff_models
from qcompile.compiler.api.evaluation import EvaluationSet
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.diff import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import Bar, console
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.files.folders import model_file
from qcompile.passes.errors import UserError


def run(args: Options) -> Document:
    """Print the nodes that differ, and what else does."""
    if args.text and args.data:
        raise UserError("--text is for language models and --data for others: give one of both")
    on = None
    if args.text or args.data:
        data = Calibration([str(path) for path in args.data])
        on = EvaluationSet(args.text, data, args.tokenizer, args.context, args.tokens or None)
    if not args.text:
        idle.told({name: "it is for --text" for name in ("context", "tokens", "tokenizer") if name in args.given})
    if args.all and args.worst is not None:
        idle.told({"all": "--worst says which nodes"})
    with Bar() as bar:
        bar.step("comparing")
        found = diff_models(
            model_file(args.a),
            model_file(args.b),
            every=args.all,
            worst=args.worst,
            on=on,
            progress=lambda what, done, total: bar.at(done, total, what),
        )
    found.sheet().show(console(answer=True))
    return found.to_dict()
