"""Settings that are given and change nothing in a run, with the reason: commands and programs are told."""

import warnings
from collections.abc import Collection, Iterator

from qcompile.compiler.api.door import worded
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import NORMS, Files
from qcompile.compiler.plan import bound_of, ensuring, is_spent, steps_that
from qcompile.compiler.recipe import SETTINGS, Recipe
from qcompile.passes.contract import Fact
from qcompile.passes.exact import split_quoted

# Settings of packed weights and of what computes with them; others of these are errors without a pass that packs.
_PACKED = ("bits", "group_size", "symmetric", "activations", "accuracy_level", "attention")
# Those that say how the codes of a width are grouped.
_GROUPS = ("group_size", "symmetric")
_PICTURES = ("image_mean", "image_std", "image_size")


def of_recipe(recipe: Recipe, given: Collection[str], *, point: bool = False) -> dict[str, str]:
    """Settings given that this list of passes does not read, by name, with the reason. point: it is one of a frontier,
    which has formats.
    """
    found: dict[str, str] = {}
    if not steps_that(recipe, ensure=Fact.PACKED):
        names = ",".join(step.name for step in recipe.passes)
        found = {name: f"no pass of {names} packs weights ({ensuring(Fact.PACKED)} does)" for name in _PACKED}
    elif recipe.target != "matmulnbits":
        found["accuracy_level"] = f"it is for target matmulnbits, this is {recipe.target}"
    if recipe.weights is not None:
        found["group_size"] = f"--weights {recipe.weights} has its own"
    if is_spent(recipe) or point:
        by = "the budget chooses" if recipe.budget is not None else f"{bound_of(recipe)} is kept by"
        by = "the point has" if point else by
        settled = f"{by} the formats of the graph's weights"
        found |= dict.fromkeys(("bits", "weights", *(() if says_some(recipe) else _GROUPS)), settled)
    if recipe.fastest and recipe.mixed and not bound_of(recipe):
        found["fastest"] = f"it is of formats of packed weights, and {recipe.mixed} keeps nodes in float here"
    if bound_of(recipe):
        found["keep_as"] = f"{bound_of(recipe)} is kept by formats, and no node in float"
    elif not recipe.mixed:
        found["keep_as"] = "no node is kept in float (--keep-worst, --keep-share, --max-kl or --min-sqnr do that)"
    return {name: why for name, why in found.items() if name in given and name in SETTINGS}


def says_some(recipe: Recipe) -> bool:
    """Whether formats of some weights are said beside those that are chosen."""
    patterns = any(split_quoted(own)[0] is None for own in recipe.weights_of)
    return patterns or any(getattr(recipe, own) != SETTINGS[own].default for own in ("lm_head", "embedding"))


def of_data(data: Calibration, given: Collection[str]) -> dict[str, str]:
    """Settings of calibration data given that this kind of data does not read."""
    return {name: why for name, why in _of_data(data) if name in given}


def warn(recipe: Recipe, data: Calibration, given: Collection[str], *, point: bool = False) -> None:
    """Warn a program of its keywords without effect; the warning points at the caller of the public function."""
    for name, why in (of_recipe(recipe, given, point=point) | of_data(data, given)).items():
        told = worded(f"{name} has no effect here: {why}", {*SETTINGS, "calibration"})
        warnings.warn(told, stacklevel=4)  # this, the function, its door, the caller


def _of_data(data: Calibration) -> Iterator[tuple[str, str]]:
    files = Files.of(data.paths)
    if files.arrays or files.reference or data.reader is not None:
        every = (
            f"{files.reference} gives what it gives" if files.reference else "arrays are taken as they are, all of them"
        )
        yield from ((name, every) for name in ("samples", "context"))
    if files.images:
        yield "context", "images have no windows"
    if data.word == NORMS:
        yield from ((name, "--calibration norms runs nothing") for name in ("samples", "context"))
    if not files.images:
        yield from ((name, "no images are given with --calibration") for name in _PICTURES)
