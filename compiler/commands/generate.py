"""`qcompile generate`: text from a decoder, as it comes."""

import sys
from collections.abc import Sequence

from rich.console import Console

from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.generate import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import console
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.measure.generate import Sampling, answer
from qcompile.compiler.measure.loaded import Subject


def run(args: Options) -> Document:
    """Print the text on stdout, behind the prompt where it goes on with that, and the speed on stderr."""
    if args.temperature == 0:
        why = "--temperature 0 draws nothing"
        idle.told({name: why for name in ("top_p", "seed") if name in args.given})
    model = model_file(args.model)
    subject = Subject(model, accuracy_level=args.accuracy_level, provider=args.provider, kernels=args.kernels)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    tokenizer = load_tokenizer(args.tokenizer or model)
    written = answer(subject, tokenizer, args.prompt, sampling, count=args.max_tokens, raw=args.raw)
    out, pieces = console(answer=True), list[str]()
    if not written.chat:
        pieces.append(args.prompt)
        _write(out, args.prompt)
    for piece in written.pieces:
        pieces.append(piece)
        _write(out, piece)
    _write(out, "\n")
    if not args.quiet:
        print(_speed(written.times, written.prompt), file=sys.stderr)
    spent = written.times[-1] - written.times[0]
    made = {"prompt_tokens": written.prompt, "tokens": len(written.times) - 1, "seconds": spent}
    return {"text": "".join(pieces), "chat": written.chat, **made}


def _write(out: Console, text: str) -> None:
    """As it is, at once: a model's text is no name to be made visible."""
    if not out.quiet:
        print(text, end="", flush=True)


def _speed(times: Sequence[float], prompt: int) -> str:
    """First token and speed after it: the prompt's run is not the speed of a token."""
    tokens = len(times) - 1
    line = f"{tokens} tokens after a prompt of {prompt}"
    if tokens:
        line += f", the first after {times[1] - times[0]:.2f} s"
    if tokens > 1:
        line += f", then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s"
    return line
