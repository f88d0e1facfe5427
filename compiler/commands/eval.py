"""`qcompile eval`: how good models are, alone or against a reference."""

from typing import Any

from qcompile.compiler.api.evaluation import EvaluationSet, Running, evaluate_models
from qcompile.compiler.api.gate import Gate, gate_sheet, junit
from qcompile.compiler.api.verdict import tasks_sheet, verdict_sheets
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.eval import Options
from qcompile.compiler.commands.options import (
    Document,
    changed,
)
from qcompile.compiler.console.document import written
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import Bar, console, table
from qcompile.compiler.console.visible import told_apart
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.bounds import Bounds
from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores
from qcompile.compiler.measure.metric import Drop, Metric
from qcompile.compiler.measure.tasks.table import named as named_tasks
from qcompile.passes.errors import UserError, Verdict
from qcompile.runtime.sessions import operator_kernels


def run(args: Options) -> Document:
    """Evaluate, print a table, and write JSON if asked."""
    against = None if args.against is None else model_file(args.against)
    args = changed(args, models=tuple(map(model_file, args.models)), against=against)
    if args.data and not args.text:
        idle.told({name: "--data is no text" for name in ("context", "tokens", "tokenizer") if name in args.given})
    if args.tasks is None and "task_items" in args.given:
        idle.told({"task_items": "there are no --tasks"})
    data = [str(path) for path in args.data]
    test = EvaluationSet(
        args.text,
        Calibration(data),
        args.tokenizer,
        args.context,
        args.tokens or None,
        args.labels,
        args.metric,
        named_tasks(args.tasks) if args.tasks is not None else (),
        args.task_items,
    )
    lower = args.metric is not None and Metric(args.metric).lower_is_better
    drop = Drop(args.max_drop) if args.max_drop is not None else None
    bounds = Bounds(args.min_sqnr, args.max_kl, drop, lower)
    gate = Gate.read(args.gate) if args.gate is not None else None
    if args.junit is not None and gate is None and not test.tasks:
        raise UserError("--junit is of bounds and tasks: give --gate FILE or --tasks")
    if args.junit is not None and args.json_file is not None and args.junit.absolute() == args.json_file.absolute():
        raise UserError(f"--junit and --json would both be written to {args.junit}")
    read = [*args.text, *named(data), *([args.gate] if args.gate is not None else [])]
    for path in (args.json_file, args.junit):
        if path is not None:
            check_result_path([*([args.against] if args.against else []), *args.models], path, read)
    running = Running(args.accuracy_level, args.provider, args.kernels)
    with Bar() as bar:
        bar.step("loading")
        made = evaluate_models(
            args.models,
            test,
            against=args.against,
            running=running,
            progress=lambda what, done, total: bar.at(done, total, what),
            bounds=bounds,
            gate=gate,
        )
    missing: UserError | None = None
    try:
        made = made.gated(gate) if gate is not None else made
    except UserError as error:  # behind the tables and the JSON: they took long
        missing = error
    rows = made.records()
    if isinstance(made.rows[0].scores, DecoderScores):
        _print_scores(rows, running, compared=args.against is not None)
    else:
        print_outputs([own.scores for own in made.rows if isinstance(own.scores, OutputScores)])
    if args.verdict:
        sheets = verdict_sheets(made)
        idle.told({} if sheets else {"verdict": "it is for decoders on --text, with --against"})
        for sheet in sheets:
            sheet.show(console(answer=True))
    if made.tasks:
        tasks_sheet(made.tasks).show(console(answer=True))
    if made.kept:
        gate_sheet(made.kept).show(console(answer=True))
    document = made.document()
    if args.json_file is not None:
        write_text(args.json_file, written(document) + "\n")
    if args.junit is not None:
        write_text(args.junit, junit(made.kept, made.tasks, str(missing or "")))
    if missing is not None:
        raise missing
    try:
        made.check(bounds)
    except Verdict as broken:
        broken.document = document
        raise
    return document


def _print_scores(rows: list[dict[str, Any]], running: Running, *, compared: bool) -> None:
    first, names = rows[0], told_apart(row["text"] for row in rows)
    shown = table("text", "model", "size", "bits/weight", "perplexity", "KL to reference", "same top-1", numbers=5)
    for row in rows:
        bits = "" if row["linear_bits"] is None else f"{row['linear_bits']:.2f}"
        kl = "reference" if row["kl"] is None else f"{row['kl']:.5f} ± {row['kl_error']:.5f}"
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.2%}"
        size, perplexity = megabytes(row["file_bytes"]), f"{row['perplexity']:.4f}"
        reference = kl if compared else ""
        shown.add_row(names[row["text"]], row["model"], size, bits, perplexity, reference, agreement)
    out = console(answer=True)
    out.print(shown)
    out.print(
        f"{first['windows']} windows of {first['context']} tokens, begun as the tokenizer begins a text, first token "
        f"of each not scored ({first['scored']} scored), accuracy level {first['accuracy_level']}, "
        f"{operator_kernels(running.kernels, running.provider)}"
        + ("; KL(reference ‖ model) in nats per token ± standard error over tokens" if compared else "")
    )


def print_outputs(scores: list[OutputScores]) -> None:
    """A table of errors, and a line for each output that scores classes, and for a metric."""
    shown = table("model", "output", "SQNR dB", "cosine", "values", numbers=3)
    for score in scores:
        shown.add_row(score.model, score.output, f"{score.sqnr:.2f}", f"{score.cosine:.6f}", str(score.values))
    out = console(answer=True)
    out.print(shown)
    for score in scores:
        if score.classes is not None:
            out.print(f"{score.model}, {score.output}: {score.classes.told()}", soft_wrap=True)
    told = {own.model: (own.reference_metric, own.metric) for own in scores if own.metric is not None}
    for model, (before, after) in told.items():
        out.print(f"{model}: metric {before:.6g} → {after:.6g}", soft_wrap=True)
