"""`qcompile generate`: text from a decoder, as it comes."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcompile.compiler.commands.options import add_custom_ops
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.measure.generate import Sampling, generate_ids, stream
from qcompile.compiler.measure.loaded import Subject
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import KERNELS


def add_parser(subparsers: Any) -> None:
    """The options of `qcompile generate`."""
    parser = subparsers.add_parser("generate", description="Continue a prompt with a decoder.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="at most this many new tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens only (default 1: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside the model")
    parser.add_argument("--accuracy-level", type=int, default=0, choices=range(5), help="as in qcompile eval")
    add_custom_ops(parser.add_argument)
    parser.add_argument("--provider", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--kernels", default="auto", choices=KERNELS, help="as in qcompile eval")


def run(args: argparse.Namespace) -> int:
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
    print(args.prompt, end="", flush=True)
    for piece in stream(tokenizer, ids):
        print(piece, end="", flush=True)
    print(flush=True)
    _report(times, len(prompt))
    return 0


def _timed(ids: Iterator[int], times: list[float]) -> Iterator[int]:
    """The ids, noting when each came."""
    for token in ids:
        times.append(time.perf_counter())
        yield token


def _report(times: list[float], prompt: int) -> None:
    """First token and speed after it: the prompt's run is not the speed of a token."""
    tokens = len(times) - 1
    line = f"{tokens} tokens behind a prompt of {prompt}"
    if tokens:
        line += f", the first after {times[1] - times[0]:.2f} s"
    if tokens > 1:
        line += f", then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s"
    print(line, file=sys.stderr)
