"""Options of `qcompile bench`."""

from dataclasses import field
from typing import Annotated

from qcompile.compiler.commands.options import CustomOps, JsonFile, Kernels, Talk, command, option, positional

_EPILOG = """A MODEL is [NAME=]FILE.onnx[@SETTING,…]. The settings: native (qcompile operators run by the native
kernels), portable (by their ONNX bodies), level=N (accuracy level of the 4-bit products that ONNX Runtime fuses from
portable bodies: 0 exact, 4 int8 activations). So one compiled file stands for three models:
  qcompile bench small.onnx --against float.onnx a4=small.onnx@portable,level=4 a0=small.onnx@portable,level=0
Each model runs in a process of its own; they take turns, round by round. Prefill is one run over a prompt; decoding
runs single tokens after a prompt, each taking the caches of the run before, or adding to them in one buffer where
GroupQueryAttention can. Times are of the runs alone: choosing tokens and handing over inputs are left out. Ratios are
medians of the ratios of each round."""


@command()
class Options(JsonFile, Talk, CustomOps):
    """Measure load time, memory, and tokens per second."""

    epilog = _EPILOG

    model: Annotated[str, positional("MODEL", "[NAME=]FILE.onnx[@SETTING,…], see below")]
    against: Annotated[list[str], option("models to compare it with", "OTHER…", many=True)] = field(
        default_factory=list
    )
    prompt_tokens: Annotated[str, option("prefill lengths (default 1,64,512)", "N,…")] = "1,64,512"
    decode: Annotated[int, option("decoding steps (default 64; 0: none)", "N")] = 64
    decode_after: Annotated[int, option("tokens before them (default 64)", "N")] = 64
    threads: Annotated[str | None, option("threads (default: every core)", "N,…")] = None
    rounds: Annotated[int, option("turns of each model that count (default 5)", "N")] = 5
    kernels: Annotated[Kernels, option("default of the models", "{auto,native,portable}")] = "auto"
    shape: Annotated[
        list[str], option("shape of an input that is not made of tokens (repeat for several)", "NAME=N,…")
    ] = field(default_factory=list)
