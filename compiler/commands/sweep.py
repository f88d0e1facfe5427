"""`qcompile sweep`: a model under many settings, accuracy against bits per weight."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from qcompile.compiler.commands.options import add_custom_ops, add_data
from qcompile.compiler.console.terminal import console, progress
from qcompile.compiler.recipe import load_recipe
from qcompile.compiler.sweep.grid import parse_grid
from qcompile.compiler.sweep.rows import DONE, OPEN, Row, Sweep, name
from qcompile.compiler.sweep.run import sweep
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.compiler.sweep.tables import caption, reasons, terminal_table
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import KERNELS

_EPILOG = """A grid item is KEY=VALUE,VALUE,… with any key of a recipe, such as bits=4,8 group_size=32,128,channel
symmetric=yes,no. Lists have semicolons between them: "passes=pack;smooth,awq,pack" "calibration=a.txt;b.txt,c.txt;none"
(none: no files, the default data). Finished combinations are kept in DIR/cache and never run twice: run the same
command again after an interrupt, or with more values. Models are removed once they are scored. docs/sweep.md tells
what the figures are."""


def add_parser(subparsers: Any) -> None:
    """The options of `qcompile sweep`."""
    told = "Compile a model under every combination of settings, and draw accuracy against bits per weight."
    parser = subparsers.add_parser("sweep", description=told, epilog=_EPILOG)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.onnx", help="the float model")
    add("--grid", nargs="+", action="extend", required=True, metavar="KEY=VALUES", help="settings and their values")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for results, plots and the cache")
    add("--recipe", type=Path, metavar="FILE", help="settings that are not in the grid, from a YAML or TOML file")
    add(
        "--calibration",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="data for all combinations, if not in the grid",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json (default: beside the model)")
    add("--limit", type=int, metavar="N", help="run at most N combinations now")
    add("--keep-models", action="store_true", help="keep the models that are compiled now, in DIR/models")
    add("--note", default="", metavar="TEXT", help="words for the caption")
    add = parser.add_argument_group("what models are scored on").add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the bundled text's last tenth, which is then "
        "held out of the default calibration)")  # fmt: skip
    add_data(add, "inputs instead, arrays by name", "FILE.npz")
    add("--context", type=int, default=512, help="tokens in a window (default 512)")
    add("--tokens", type=int, default=2048, help="tokens of the text; 0 for all (default 2048)")
    add_custom_ops(add)
    add("--provider", default="cpu", help="cpu (default) or cuda; for compiling, set provider in the grid or recipe")
    add("--kernels", default="auto", choices=KERNELS, help="who computes the operators of qcompile (see qcompile eval)")


def run(args: argparse.Namespace) -> int:
    """Run what is open, write the results, print the table."""
    if args.limit is not None and args.limit < 0:
        raise UserError(f"--limit must be 0 or more, got {args.limit}")
    evaluation = Evaluation(args.text, args.data, args.context, args.tokens, args.kernels, args.provider)
    with _Bar() as bar:
        try:
            result = sweep(
                args.model,
                parse_grid(args.grid),
                output=args.output,
                recipe=load_recipe(args.recipe) if args.recipe else None,
                calibration=args.calibration,
                tokenizer=args.tokenizer,
                evaluation=evaluation,
                limit=args.limit,
                keep_models=args.keep_models,
                note=args.note,
                watcher=bar,
            )
        except KeyboardInterrupt:
            told = f"{bar.finished} combinations finished now; the same command goes on from here"
            print(f"qcompile: interrupted: {told}", file=sys.stderr)
            return 130
    _print(result, args.output)
    return 0


def _print(result: Sweep, folder: Path) -> None:
    out = console()
    if result.done:
        out.print(terminal_table(result))
    for line in [*caption(result), *reasons(result), *result.remarks]:
        out.print(line, soft_wrap=True)
    drawn = [] if result.remarks else ["accuracy.svg", "accuracy.png"]
    for file in ("results.json", "results.csv", "table.md", *drawn):
        out.print(f"wrote     {folder / file}", soft_wrap=True)


class _Bar:
    """A bar on a terminal's stderr, and a line for every finished combination wherever stderr goes."""

    def __init__(self) -> None:
        self.bar, self.finished, self.done = progress(), 0, 0
        self.task = self.bar.add_task("starting", total=None)
        self.name, self.started = "", time.monotonic()

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def begin(self, sweep: Sweep, row: Row, done: int, total: int) -> None:
        """A new combination."""
        self.name, self.done = name(row.values, sweep.varying), done
        self.bar.update(self.task, total=total, completed=done)

    def share(self, what: str, share: float) -> None:
        """A part of it."""
        self.bar.update(self.task, description=f"{self.name}: {what}".lstrip(": "), completed=self.done + share)

    def end(self, sweep: Sweep, row: Row, left: float) -> None:
        """Its figures in a line, with the time left as earlier combinations of the same passes had it."""
        self.finished += 1
        told = row.reason
        if row.status == DONE:
            bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f} bits, "
            told = f"{bits}{sweep.error} {row.scores[sweep.error]:.3g}"
        ready = sum(one.status != OPEN for one in sweep.rows)
        rest = f", about {left / 60:.1f} min left" if left else ""
        told = f"{ready}/{len(sweep.rows)}  {self.name}: {told} ({row.seconds:.0f} s{rest})"
        self.bar.console.print(told, markup=False, highlight=False, soft_wrap=True)
