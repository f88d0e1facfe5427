"""Options of `qcompile sensitivity`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import (
    Calibrating,
    Clustered,
    Common,
    Recipes,
    command,
    option,
    positional,
)
from qcompile.compiler.recipe import DATA, WHICH
from qcompile.passes import lists


@command(WHICH, DATA)
class Options(Common, Clustered, Calibrating, Recipes):
    """Rank the nodes that qdq or dynamic make integer by what each of them alone changes in the output, all others in
    float: KL of a decoder's logits (nats a token), else the signal to noise of the outputs. Measured on two windows of
    256 tokens of the calibration text that calibration does not use (of other data, on four calibration batches). The
    float and the integer weights are in memory at once.
    The result is kept in ~/.cache/qcompile (QCOMPILE_CACHE moves it). `qcompile MODEL.onnx --keep-worst N`,
    `--max-kl NATS` and `--min-sqnr DB` leave the worst nodes in float."""

    model: Annotated[Path, positional("MODEL", "the float model, or its folder")]
    output: Annotated[Path | None, option("write the whole ranking there", "FILE.json", alias="-o")] = None
    passes: Annotated[
        str | None,
        option(f"ordered list of passes with qdq or dynamic in it (default: {lists.INTEGER})", "PASSES", under=WHICH),
    ] = None
