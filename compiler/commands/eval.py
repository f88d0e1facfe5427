"""`qcompile eval`: how good models are, alone or against a reference."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.compiler.commands.options import add_custom_ops, add_data
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import console, progress, table
from qcompile.compiler.data.calibration import data_batches
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.data.feeds import Batch, token_batches
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.tokens import Tokenizer, find_tokenizer, load_tokenizer
from qcompile.compiler.files.load import check_result_path, load_model
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores, evaluate_many, score_outputs
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.report.sizes import model_sizes
from qcompile.passes.errors import UserError
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
    if bool(args.text) == bool(args.data):
        raise UserError("give either --text FILE … for a language model or --data FILE.npz … with --against")
    if args.tokens < 2 and args.tokens != 0:
        raise UserError(f"--tokens must be at least 2 (or 0 for the whole text), got {args.tokens}")
    first = args.against or args.models[0]
    if args.json is not None:
        check_result_path([first, *args.models], args.json, [*args.text, *named([str(path) for path in args.data])])
    plan = input_plan(load_model(first))
    if args.text and plan.logits is not None:
        rows = _on_text(args, plan)
    elif args.against is None:
        if args.text:
            plan.require_decoder()
        raise UserError("outputs are compared with a reference: give it with --against REF.onnx")
    else:
        rows = _outputs(args)
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")
    return 0


def _on_text(args: argparse.Namespace, plan: InputPlan) -> list[dict[str, Any]]:
    tokenizer = _tokenizer(args)
    rows: list[dict[str, Any]] = []
    texts = [text_windows(text, tokenizer, plan, args.context, args.tokens or None) for text in args.text]
    for text, windows in zip(args.text, texts, strict=True):
        with progress() as bar:
            task = bar.add_task(f"{text.name}")
            scores = evaluate_many(
                args.against,
                args.models,
                windows,
                accuracy_level=args.accuracy_level,
                provider=args.provider,
                kernels=args.kernels,
                progress=lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            )
        rows += [_row(text, score) for score in scores]
    _print_scores(rows, args)
    return rows


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The one asked for, else the first that lies beside a model."""
    places = [args.tokenizer] if args.tokenizer else [*([args.against] if args.against else []), *args.models]
    return load_tokenizer(next((place for place in places if find_tokenizer(place)), places[-1]))


def _row(text: Path, score: DecoderScores) -> dict[str, Any]:
    sizes = asdict(model_sizes(Path(score.model)))
    return {"text": str(text), **asdict(score), "perplexity": score.perplexity, **sizes}


def _print_scores(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    first = rows[0]
    shown = table("text", "model", "size", "linear bits", "perplexity", "KL to reference", "same top-1", numbers=5)
    for row in rows:
        bits = "" if row["linear_bits"] is None else f"{row['linear_bits']:.2f}"
        kl = "reference" if row["kl"] is None else f"{row['kl']:.5f} ± {row['kl_error']:.5f}"
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.2%}"
        size, perplexity = megabytes(row["file_bytes"]), f"{row['perplexity']:.4f}"
        reference = kl if args.against else ""
        shown.add_row(Path(row["text"]).name, row["model"], size, bits, perplexity, reference, agreement)
    out = console()
    out.print(shown)
    out.print(
        f"{first['windows']} windows of {first['context']} tokens, first token of each not scored "
        f"({first['scored']} scored), no BOS added, accuracy level {first['accuracy_level']}, "
        f"{operator_kernels(args.kernels, args.provider)}"
        + ("; KL(reference ‖ model) in nats per token ± standard error over tokens" if args.against else "")
    )


def _outputs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """SQNR and cosine of every output, on .npz inputs or on the windows of a text."""

    def batches(plan: InputPlan) -> Sequence[Batch]:
        if args.data:
            return data_batches(plan, args.against, args.data)
        tokenizer = _tokenizer(args)
        texts = [text_windows(text, tokenizer, plan, args.context, args.tokens or None) for text in args.text]
        return [batch for windows in texts for batch in token_batches(plan, windows)]

    with progress() as bar:
        task = bar.add_task("comparing outputs")
        scores = score_outputs(
            args.against,
            args.models,
            batches,
            accuracy_level=args.accuracy_level,
            provider=args.provider,
            kernels=args.kernels,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print_outputs(scores)
    return [asdict(score) | asdict(model_sizes(Path(score.model))) for score in scores]


def _print_outputs(scores: list[OutputScores]) -> None:
    shown = table("model", "output", "SQNR dB", "cosine", "values", numbers=3)
    for score in scores:
        shown.add_row(score.model, score.output, f"{score.sqnr:.2f}", f"{score.cosine:.6f}", str(score.values))
    console().print(shown)
