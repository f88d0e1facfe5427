"""`qcompile generate`: text from a decoder, as it comes."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from rich.console import Console

from qcompile.compiler.commands.options import Common, CustomOps, Document, Runs, command, option, positional
from qcompile.compiler.console.terminal import console
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.measure.generate import Sampling, generate_ids, stream
from qcompile.compiler.measure.loaded import Subject
from qcompile.passes.errors import UserError


@command()
class Options(Common, Runs, CustomOps):
    """Continue a prompt with a decoder."""

    model: Annotated[Path, positional("MODEL.onnx", "a decoder")]
    prompt: Annotated[str, option("the text to continue", "TEXT", allow_leading_hyphen=True)]
    max_tokens: Annotated[int, option("at most this many new tokens (default 64)", "N")] = 64
    temperature: Annotated[float, option("0 (default) takes the most likely token", "T")] = 0.0
    top_p: Annotated[float, option("draw from the likeliest tokens only (default 1: all)", "P")] = 1.0
    seed: Annotated[int, option("of the draws (default 0)", "SEED")] = 0
    tokenizer: Annotated[Path | None, option("default: beside the model", "DIR")] = None


def run(args: Options) -> Document:
    """Print the prompt and what follows on stdout, the speed on stderr."""
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, got {args.max_tokens}")
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    prompt = tokenizer.encode(args.prompt, special=True)
    while prompt and prompt[-1] in tokenizer.eos_ids:  # a template that closes the text
        prompt.pop()
    subject = Subject(args.model, accuracy_level=args.accuracy_level, provider=args.provider, kernels=args.kernels)
    tokenizer.check_vocabulary(subject.plan.vocabulary, prompt)
    times: list[float] = [time.perf_counter()]
    ids = _timed(generate_ids(subject, prompt, args.max_tokens, sampling, tokenizer.eos_ids), times)
    out = console(answer=True)
    pieces = [args.prompt]
    _write(out, args.prompt)
    for piece in stream(tokenizer, ids):
        pieces.append(piece)
        _write(out, piece)
    _write(out, "\n")
    _report(times, len(prompt), quiet=args.quiet)
    return {
        "text": "".join(pieces),
        "prompt_tokens": len(prompt),
        "tokens": len(times) - 1,
        "seconds": times[-1] - times[0],
    }


def _write(out: Console, text: str) -> None:
    """As it is, at once: a model's text is no name to be made visible."""
    if not out.quiet:
        print(text, end="", flush=True)


def _timed(ids: Iterator[int], times: list[float]) -> Iterator[int]:
    """The ids, noting when each came."""
    for token in ids:
        times.append(time.perf_counter())
        yield token


def _report(times: list[float], prompt: int, *, quiet: bool) -> None:
    """First token and speed after it: the prompt's run is not the speed of a token."""
    tokens = len(times) - 1
    line = f"{tokens} tokens behind a prompt of {prompt}"
    if tokens:
        line += f", the first after {times[1] - times[0]:.2f} s"
    if tokens > 1:
        line += f", then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s"
    if not quiet:
        print(line, file=sys.stderr)
