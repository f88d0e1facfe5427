"""Options that were given and change nothing in a run: each is told, with the reason."""

from collections.abc import Mapping

from qcompile.compiler.api.idle import of_data, of_recipe
from qcompile.compiler.commands.options import Calibrating, Talk
from qcompile.compiler.console.terminal import remark
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.recipe import Recipe


def told(found: Mapping[str, str]) -> None:
    """Say of each option that it has no effect, on stderr."""
    for name, why in found.items():
        remark(f"--{name.replace('_', '-')} has no effect here: {why}")


def of(args: Talk, recipe: Recipe, *, point: bool = False) -> None:
    """Say it of a command that calibrates. point: the recipe is one of a frontier."""
    data = of_data(Calibration(args.calibration), args.given) if isinstance(args, Calibrating) else {}
    told(of_recipe(recipe, args.given, point=point) | data)
