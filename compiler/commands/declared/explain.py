"""Options of `qcompile explain`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, command, option, positional


@command()
class Options(Common):
    """Why a node of a compiled model got what it got: what each pass decided on it, the squared errors of what was
    tried, relative to doing nothing, and its own error on the check batches. The report beside the model has it."""

    model: Annotated[Path, positional("MODEL", "the compiled model, or its folder")]
    nodes: Annotated[tuple[str, ...], positional("NODE", "names of nodes or of weights; * is for any letters")] = ()
    worst: Annotated[int | None, option("the N nodes of largest error (10 where no node is named)", "N")] = None
