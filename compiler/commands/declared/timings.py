"""Options of `qcompile timings`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, Recipes, command, option, positional
from qcompile.compiler.recipe import WHAT, WHICH


@command(WHAT, WHICH)
class Options(Common, Recipes):
    """Measure how long each matrix product of a model takes on this machine, in float and in each format that --budget
    and --fastest choose from: as the compiler stores it for the target, run by ONNX Runtime, one row at a time for
    decoders, 64 for others. Seconds, with no data. The times are kept in ~/.cache/qcompile (QCOMPILE_CACHE moves it);
    the file is for `qcompile MODEL.onnx --fastest --max-kl NATS --for-machine FILE` on another machine."""

    model: Annotated[Path, positional("MODEL", "the float model, or its folder")]
    output: Annotated[Path | None, option("write the table there", "FILE.json", alias="-o")] = None
