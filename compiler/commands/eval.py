"""`qcompile eval`: how good models are, alone or against a reference."""

import argparse
import json
from pathlib import Path
from typing import Any

from qcompile.compiler.api.evaluation import EvaluationSet, Running, evaluate_models
from qcompile.compiler.commands.options import add_custom_ops, add_data
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import console, progress, table
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores
from qcompile.runtime.sessions import KERNELS, operator_kernels

_EPILOG = """Perplexity: non-overlapping windows of --context tokens from the start of the text; the first token of a
window is given, not scored; no BOS is added. KL(reference ‖ model): mean over the scored tokens, in nats, ± its
standard error. A model that is no decoder is compared with --against by SQNR and cosine of every output."""


def add_parser(subparsers: Any) -> None:
    """The options of `qcompile eval`."""
    parser = subparsers.add_parser("eval", description="Evaluate models on text, or on .npz inputs.", epilog=_EPILOG)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--against", type=Path, metavar="REF.onnx", help="the model they should be like")
    parser.add_argument(
        "--text", nargs="+", action="extend", type=Path, default=[], metavar="FILE", help="UTF-8 text files"
    )
    add_data(parser.add_argument, "inputs: .npz (arrays by name), .npy or image files, or folders of them")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside one of the models")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text; 0 for all (default 4096)")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        default=0,
        choices=range(5),
        help="what ONNX Runtime may do in 4-bit products: 0 exact (default), 4 int8 activations (its own default)",
    )
    add_custom_ops(parser.add_argument)
    parser.add_argument("--provider", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=KERNELS,
        help="who computes the operators of qcompile: native, its library (on cuda unverified on GPU); portable, ONNX "
        "Runtime through their ONNX bodies; auto (default), the library where there is one and the provider is the CPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, and write JSON if asked."""
    test = EvaluationSet(args.text, args.data, args.tokenizer, args.context, args.tokens or None)
    if args.json is not None:
        read = [*args.text, *named([str(path) for path in args.data])]
        check_result_path([*([args.against] if args.against else []), *args.models], args.json, read)
    running = Running(args.accuracy_level, args.provider, args.kernels)
    with progress() as bar:
        task = bar.add_task("loading")
        made = evaluate_models(
            args.models,
            test,
            against=args.against,
            running=running,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    rows = [own.row() for own in made.rows]
    if isinstance(made.rows[0].scores, DecoderScores):
        _print_scores(rows, running, compared=args.against is not None)
    else:
        _print_outputs([own.scores for own in made.rows if isinstance(own.scores, OutputScores)])
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")
    return 0


def _print_scores(rows: list[dict[str, Any]], running: Running, *, compared: bool) -> None:
    first = rows[0]
    shown = table("text", "model", "size", "linear bits", "perplexity", "KL to reference", "same top-1", numbers=5)
    for row in rows:
        bits = "" if row["linear_bits"] is None else f"{row['linear_bits']:.2f}"
        kl = "reference" if row["kl"] is None else f"{row['kl']:.5f} ± {row['kl_error']:.5f}"
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.2%}"
        size, perplexity = megabytes(row["file_bytes"]), f"{row['perplexity']:.4f}"
        reference = kl if compared else ""
        shown.add_row(Path(row["text"]).name, row["model"], size, bits, perplexity, reference, agreement)
    out = console()
    out.print(shown)
    out.print(
        f"{first['windows']} windows of {first['context']} tokens, first token of each not scored "
        f"({first['scored']} scored), no BOS added, accuracy level {first['accuracy_level']}, "
        f"{operator_kernels(running.kernels, running.provider)}"
        + ("; KL(reference ‖ model) in nats per token ± standard error over tokens" if compared else "")
    )


def _print_outputs(scores: list[OutputScores]) -> None:
    shown = table("model", "output", "SQNR dB", "cosine", "values", numbers=3)
    for score in scores:
        shown.add_row(score.model, score.output, f"{score.sqnr:.2f}", f"{score.cosine:.6f}", str(score.values))
    console().print(shown)
