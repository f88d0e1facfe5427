"""Options of `qcompile diff`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, CustomOps, command, option, positional

_DATA = "on data"


@command(_DATA)
class Options(Common, CustomOps):
    """What differs from model A to model B: formats, bytes and errors of their weights, totals, recipe, operators.
    Either may be float. Errors and decisions are those of the reports beside them; --json has all of them. With data,
    KL of a decoder, or SQNR of every output, is told of B against A, and the relative error of what goes on from one
    layer to the next where both graphs have it by one name."""

    a: Annotated[Path, positional("A", "the first model, or its folder")]
    b: Annotated[Path, positional("B", "the second one")]
    all: Annotated[bool, option("list every node that differs instead of alike ones together")] = False
    worst: Annotated[int | None, option("the N nodes whose errors grew most", "N")] = None
    text: Annotated[list[Path], option("UTF-8 text files", "FILE…", many=True, under=_DATA)] = field(
        default_factory=list
    )
    data: Annotated[
        list[Path],
        option("inputs: .npz, .npy or image files, or folders of them", "FILE…", many=True, under=_DATA),
    ] = field(default_factory=list)
    tokenizer: Annotated[Path | None, option("default: beside one of the models", "DIR", under=_DATA)] = None
    context: Annotated[int, option("tokens in a window (default 512)", "N", under=_DATA)] = 512
    tokens: Annotated[int, option("tokens of each text; 0 for all (default 4096)", "N", under=_DATA)] = 4096
