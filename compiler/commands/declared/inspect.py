"""Options of `qcompile inspect`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, command, option, positional


@command()
class Options(Common):
    """Show what is in a model: types, sizes, what is quantized."""

    model: Annotated[Path, positional("MODEL", "the model, or its folder")]
    all: Annotated[bool, option("list every weight instead of alike ones together")] = False
