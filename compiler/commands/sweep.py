"""`qcompile sweep`: a model under many settings, accuracy against bits per weight."""

from dataclasses import asdict
from pathlib import Path

from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.sweep import Options
from qcompile.compiler.commands.options import (
    Document,
    changed,
)
from qcompile.compiler.console.terminal import Bar, console
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.recipe import load_recipe
from qcompile.compiler.sweep.grid import parse_grid
from qcompile.compiler.sweep.rows import DONE, OPEN, Row, Sweep, name
from qcompile.compiler.sweep.run import sweep
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.compiler.sweep.tables import caption, reasons, terminal_table
from qcompile.passes.errors import UserError


def run(args: Options) -> Document:
    """Run what is open, write the results, print the table."""
    args = changed(args, model=model_file(args.model))
    if args.limit is not None and args.limit < 0:
        raise UserError(f"--limit must be 0 or more, got {args.limit}")
    if args.data and not args.text:
        idle.told({name: "--data is no text" for name in ("context", "tokens") if name in args.given})
    evaluation = Evaluation(args.text, args.data, args.context, args.tokens, args.kernels, args.provider)
    with Bar() as bar:
        watcher = _Watcher(bar)
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
                watcher=watcher,
            )
        except KeyboardInterrupt:
            told = f"{watcher.finished} combinations finished now; the same command goes on from here"
            raise KeyboardInterrupt(told) from None
    _print(result, args.output)
    return asdict(result)


def _print(result: Sweep, folder: Path) -> None:
    out = console()
    if result.done:
        out.print(terminal_table(result))
    for line in [*caption(result), *reasons(result), *result.remarks]:
        out.print(line, soft_wrap=True)
    drawn = [] if result.remarks else ["accuracy.svg", "accuracy.png"]
    for file in ("results.json", "results.csv", "table.md", *drawn):
        out.print(f"wrote     {folder / file}", soft_wrap=True)


class _Watcher:
    """The bar of a sweep, and a line for every finished combination."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.finished, self.done, self.total, self.name = bar, 0, 0, 0, ""

    def begin(self, sweep: Sweep, row: Row, done: int, total: int) -> None:
        """A new combination."""
        self.name, self.done, self.total = name(row.values, sweep.varying), done, total
        self.bar.at(done, total)

    def share(self, what: str, share: float) -> None:
        """A part of it."""
        self.bar.at(self.done + share, self.total, f"{self.name}: {what}".lstrip(": "))

    def end(self, sweep: Sweep, row: Row, left: float) -> None:
        """Its figures in a line, with the time left as earlier combinations of the same passes had it."""
        self.finished += 1
        told = row.reason
        if row.status == DONE:
            bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f} bits, "
            told = f"{bits}{sweep.error} {row.scores[sweep.error]:.3g}"
        ready = sum(one.status != OPEN for one in sweep.rows)
        rest = f", about {left / 60:.1f} min left" if left else ""
        self.bar.line(f"{ready}/{len(sweep.rows)}  {self.name}: {told} ({row.seconds:.0f} s{rest})")
