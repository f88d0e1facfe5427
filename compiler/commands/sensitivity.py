"""`qcompile sensitivity`: which integer nodes change what a model says, from the worst on."""

import json
from pathlib import Path
from typing import Annotated

from qcompile.compiler.api.sensitivity import DEFAULT_PASSES, rank_nodes
from qcompile.compiler.commands import compile as compiling
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.options import (
    Calibrating,
    Clustered,
    Common,
    Document,
    Recipes,
    changed,
    command,
    option,
    positional,
    recipe_of,
)
from qcompile.compiler.console.terminal import Bar, console
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.recipe import DATA, WHICH

_DEFAULT_PASSES = ",".join(map(str, DEFAULT_PASSES))
_SHOWN = 30


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
        option(f"ordered list of passes with qdq or dynamic in it (default: {_DEFAULT_PASSES})", "PASSES", under=WHICH),
    ] = None


def run(args: Options) -> Document:
    """Rank, or read the ranking of an earlier call; print the worst."""
    args = changed(args, model=model_file(args.model))
    if args.passes is None and args.recipe is None:
        args = changed(args, passes=_DEFAULT_PASSES)
    recipe = recipe_of(args)
    idle.of(args, recipe)
    if args.output is not None:
        check_result_path([args.model], args.output, named(args.calibration))
    screen = console(answer=True)
    with Bar() as bar:
        ranking = rank_nodes(args.model, recipe, calibration=compiling.calibration_of(args), progress=bar)
    if args.output is not None:
        write_text(args.output, json.dumps(ranking.to_dict(), indent=1) + "\n")
    ranking.sheet(_SHOWN).show(screen)
    if args.output is not None:
        screen.print(f"wrote     {args.output}", soft_wrap=True)
    return ranking.to_dict()
