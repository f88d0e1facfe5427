"""Options of `qcompile calibrate`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import (
    Calibrating,
    Common,
    Recipes,
    command,
    option,
    positional,
)
from qcompile.compiler.recipe import DATA, WHICH


@command(WHICH, DATA)
class Options(Common, Calibrating, Recipes):
    """Run the calibration data through a model and save what the observers of its activations learn.
    `qcompile MODEL.onnx --passes smooth,qdq --statistics FILE` then takes its ranges from the file: behind the same
    passes, for any grid (activations=int8, provider=tensorrt, ...) that leaves those passes alone. What the observers
    mse, percentile and entropy learn is the same, and serves minmax, too."""

    model: Annotated[Path, positional("MODEL", "the float model, or its folder")]
    output: Annotated[
        Path | None,
        option("the file of statistics (default: MODEL.statistics beside the model)", "STATS", alias="-o"),
    ] = None
    passes: Annotated[
        str | None,
        option("ordered list of passes with qdq in it (default: smooth,qdq)", "PASSES", under=WHICH),
    ] = None
    observer: Annotated[str | None, option("short for qdq(observer=NAME)", "NAME", under=WHICH)] = None
