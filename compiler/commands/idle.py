"""Options that were given and change nothing in a run: each is told, with the reason."""

from collections.abc import Collection, Iterator, Mapping

from qcompile.compiler.commands.options import Calibrating, Talk
from qcompile.compiler.console.terminal import remark
from qcompile.compiler.data.calibration_files import Files
from qcompile.compiler.plan import ensuring, steps_that
from qcompile.compiler.recipe import SETTINGS, Recipe
from qcompile.passes.contract import Fact

# Settings of packed weights and of what computes with them; others of these are errors without a pass that packs.
_PACKED = ("bits", "group_size", "symmetric", "activations", "accuracy_level", "attention")
_PICTURES = ("image_mean", "image_std", "image_size")


def told(found: Mapping[str, str]) -> None:
    """Say of each option that it has no effect, on stderr."""
    for name, why in found.items():
        remark(f"--{name.replace('_', '-')} has no effect here: {why}")


def of_recipe(recipe: Recipe, given: Collection[str]) -> dict[str, str]:
    """Settings given as options that this list of passes does not read, by name, with the reason."""
    found: dict[str, str] = {}
    if not steps_that(recipe, ensure=Fact.PACKED):
        names = ",".join(step.name for step in recipe.passes)
        found = {name: f"no pass of {names} packs weights ({ensuring(Fact.PACKED)} does)" for name in _PACKED}
    elif recipe.target != "matmulnbits":
        found["accuracy_level"] = f"it is for target matmulnbits, this is {recipe.target}"
    if recipe.weights is not None:
        found["group_size"] = f"--weights {recipe.weights} has its own"
    if not recipe.mixed:
        found["keep_as"] = "no node is kept in float (--keep-worst, --max-kl or --min-sqnr do that)"
    return {name: why for name, why in found.items() if name in given and name in SETTINGS}


def of(args: Talk, recipe: Recipe) -> None:
    """Say it of a command that calibrates."""
    told(of_recipe(recipe, args.given) | (of_data(args, args.given) if isinstance(args, Calibrating) else {}))


def of_data(args: Calibrating, given: Collection[str]) -> dict[str, str]:
    """Options of calibration data that this kind of data does not read."""
    return {name: why for name, why in _of_data(args) if name in given}


def _of_data(args: Calibrating) -> Iterator[tuple[str, str]]:
    words = args.calibration
    files = Files.of([] if words in (["self"], ["norms"]) else words)
    if files.arrays or files.reference:
        every = (
            "arrays are taken as they are, all of them" if files.arrays else f"{files.reference} gives what it gives"
        )
        yield from ((name, every) for name in ("samples", "context"))
    if files.images:
        yield "context", "images have no windows"
    if words == ["norms"]:
        yield from ((name, "--calibration norms runs nothing") for name in ("samples", "context"))
    if not files.images:
        yield from ((name, "no images are given with --calibration") for name in _PICTURES)
