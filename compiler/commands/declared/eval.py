"""Options of `qcompile eval`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import (
    CustomOps,
    JsonFile,
    Runs,
    Threads,
    command,
    option,
    positional,
)

_EPILOG = """Perplexity: non-overlapping windows of --context tokens from the start of the text; the first token of a
window is given, not scored: BOS, where the tokenizer puts one before a text. KL(reference ‖ model): mean over the
scored tokens, in nats, ± its standard error. --verdict: flips, percentiles of KL and KL by position, with 95 %
intervals. Several texts have rows over all of them, too. A model that is no decoder is compared with --against by
SQNR and cosine of every output, and where an output scores classes (rows, classes) by the most likely ones. --metric
calls function(inputs, outputs, labels): lists of dicts of arrays, one for each batch, and the labels or None; it
returns a number of which more is better, unless it has an attribute lower_is_better. Exit code 1: a bound is broken
(--max-kl, --min-sqnr, --max-drop, --gate; docs/verdict.md has its figures). What the report beside a model names as
calibrated on is refused."""
_BOUNDS = "bounds"


@command()
class Options(JsonFile, Threads, Runs, CustomOps):
    """Evaluate models on text, or on .npz inputs."""

    epilog = _EPILOG

    models: Annotated[tuple[Path, ...], positional("MODEL", "models to judge, or their folders")]
    against: Annotated[Path | None, option("the model they should be like", "REF.onnx")] = None
    text: Annotated[list[Path], option("UTF-8 text files; .jsonl: a text a line", "FILE…", many=True)] = field(
        default_factory=list
    )
    data: Annotated[
        list[Path],
        option("inputs: .npz (arrays by name), .npy or image files, or folders of them", "FILE…", many=True),
    ] = field(default_factory=list)
    tokenizer: Annotated[Path | None, option("default: beside one of the models", "DIR")] = None
    context: Annotated[int, option("tokens in a window (default 512)", "N")] = 512
    tokens: Annotated[int, option("tokens of each text; 0 for all (default 4096)", "N")] = 4096
    labels: Annotated[
        Path | None,
        option(
            "class numbers of the rows of --data: .npy, .npz, or lines that end in one, maybe after an image's name",
            "FILE",
        ),
    ] = None
    tasks: Annotated[
        str | None,
        option(
            "of decoders: cloze, next-sentence, needle, arithmetic, pattern, code, with commas between, or all: made "
            "here, nothing is downloaded; without --text the tasks' bundled text is scored",
            "NAMES",
        ),
    ] = None
    task_items: Annotated[int, option("items of each task (default 100)", "N")] = 100
    verdict: Annotated[
        bool, option("tell of a decoder's flips, percentiles of KL and KL by position, too (--json always does)")
    ] = False
    metric: Annotated[str | None, option("a score of your own on --data", "module:function")] = None
    max_kl: Annotated[float | None, option("exit with 1 where a text has more", "NATS", under=_BOUNDS)] = None
    min_sqnr: Annotated[float | None, option("exit with 1 where an output has less", "DB", under=_BOUNDS)] = None
    max_drop: Annotated[
        str | None,
        option(
            "exit with 1 where the score (of --metric, else accuracy by --labels, else top-1 agreement) loses more: "
            "0.5% of the reference's, or 0.005",
            "DROP",
            under=_BOUNDS,
        ),
    ] = None
    gate: Annotated[
        Path | None,
        option(
            "bounds on any figure of the JSON, YAML or TOML: exit with 1 where one is broken", "FILE", under=_BOUNDS
        ),
    ] = None
    junit: Annotated[
        Path | None, option("write what became of the gate's bounds, and of tasks, as JUnit XML", "FILE", under=_BOUNDS)
    ] = None
