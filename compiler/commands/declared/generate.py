"""Options of `qcompile generate`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, CustomOps, Runs, command, option, positional


@command()
class Options(Common, Runs, CustomOps):
    """Let a decoder answer a prompt, word by word as it comes: an instruct model by its own chat template, where one
    lies beside its tokenizer, others by going on with the text."""

    model: Annotated[Path, positional("MODEL", "a decoder: its .onnx file, or the folder that it is in")]
    prompt: Annotated[str, option("the question, or the text to go on with", "TEXT", allow_leading_hyphen=True)]
    raw: Annotated[bool, option("go on with the text as it is, without the chat template")] = False
    max_tokens: Annotated[int, option("at most this many new tokens (default 64)", "N")] = 64
    temperature: Annotated[float, option("0 (default) takes the most likely token", "T")] = 0.0
    top_p: Annotated[float, option("draw from the likeliest tokens only (default 1: all)", "P")] = 1.0
    seed: Annotated[int, option("of the draws (default 0)", "SEED")] = 0
    tokenizer: Annotated[Path | None, option("default: beside the model", "DIR")] = None
