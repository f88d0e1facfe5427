"""`qcompile sensitivity`: which integer nodes change what a model says, from the worst on."""

import json

from qcompile.compiler.api.sensitivity import DEFAULT_PASSES, rank_nodes
from qcompile.compiler.commands import compile as compiling
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.sensitivity import Options
from qcompile.compiler.commands.options import (
    Document,
    changed,
    recipe_of,
)
from qcompile.compiler.console.terminal import Bar, console
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text

_DEFAULT_PASSES = ",".join(map(str, DEFAULT_PASSES))
_SHOWN = 30


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
