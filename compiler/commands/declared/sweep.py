"""Options of `qcompile sweep`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import (
    Clustered,
    Common,
    CustomOps,
    Kernelled,
    command,
    option,
    positional,
)

_SCORED = "what models are scored on"
_EPILOG = """A grid item is KEY=VALUE,VALUE,… with any key of a recipe, such as bits=4,8 group_size=32,128,channel
symmetric=yes,no. Lists have semicolons between them: "passes=pack;smooth,awq,pack". Calibration data has a plus between
the files of one value: calibration=general,code.txt,general+code.txt (general: the bundled text). Finished
combinations are kept in DIR/cache and never run twice: run the same command again after an interrupt, or with more
values. Models are removed once they are scored. docs/sweep.md tells what the figures are."""


@command()
class Options(Common, Clustered, Kernelled, CustomOps):
    """Compile a model under every combination of settings, and draw accuracy against bits per weight."""

    epilog = _EPILOG

    model: Annotated[Path, positional("MODEL", "the float model, or its folder")]
    grid: Annotated[list[str], option("settings and their values", "KEY=VALUES…", many=True)]
    output: Annotated[Path, option("folder for results, plots and the cache", "DIR", alias="-o")]
    recipe: Annotated[Path | None, option("settings that are not in the grid, from a YAML or TOML file", "FILE")] = None
    calibration: Annotated[list[str], option("data for all combinations, if not in the grid", "FILE…", many=True)] = (
        field(default_factory=list)
    )
    tokenizer: Annotated[Path | None, option("folder with tokenizer.json (default: beside the model)", "DIR")] = None
    limit: Annotated[int | None, option("run at most N combinations now", "N")] = None
    keep_models: Annotated[bool, option("keep the models that are compiled now, in DIR/models")] = False
    note: Annotated[str, option("words for the caption", "TEXT")] = ""
    text: Annotated[
        list[Path],
        option(
            "UTF-8 texts, each scored by itself, too; general is the bundled text's last tenth, which is then held out "
            "of calibration (default)",
            "FILE…",
            under=_SCORED,
            many=True,
        ),
    ] = field(default_factory=list)
    data: Annotated[
        list[Path],
        option("inputs instead: arrays by name, or images, or folders of them", "FILE.npz…", under=_SCORED, many=True),
    ] = field(default_factory=list)
    context: Annotated[int, option("tokens in a window (default 512)", "N", under=_SCORED)] = 512
    tokens: Annotated[int, option("tokens of each text; 0 for all (default 2048)", "N", under=_SCORED)] = 2048
    provider: Annotated[
        str,
        option("cpu (default) or cuda; for compiling, set provider in the grid or recipe", "NAME", under=_SCORED),
    ] = "cpu"
