"""Recipes from a program: of a file, of keywords, or both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from qcompile.compiler import recipe as recipes
from qcompile.compiler.api.door import door
from qcompile.compiler.api.models import PathLike
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.recipe import SETTINGS, Recipe, dump_recipe
from qcompile.compiler.settings.steps import Step

# A list as the command line takes it, or its items.
Passes: TypeAlias = str | Sequence[str | Step]


@door
def load_recipe(path: PathLike) -> Recipe:
    """The recipe in a .yaml, .yml or .toml file (docs/recipe.md)."""
    return recipes.load_recipe(Path(path))


@door
def save_recipe(recipe: Recipe, path: PathLike) -> None:
    """Write a recipe as YAML, ready for `--recipe`."""
    write_text(Path(path), dump_recipe(recipe))


def recipe_of(
    recipe: Recipe | PathLike | None, passes: Passes | None, fields: Mapping[str, Any], default: str = ""
) -> Recipe:
    """The recipe's settings, or those of its file, overridden by what is given; UserError for an unknown one."""
    own = recipe if isinstance(recipe, Recipe) else load_recipe(recipe) if recipe is not None else None
    plain: dict[str, Any] = own.to_dict() if own is not None else {"passes": default} if default else {}
    return Recipe.from_dict(plain | plain_of(passes, fields), "settings")


def plain_of(passes: Passes | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, as a recipe file has it."""
    plain: dict[str, Any] = {}
    if passes is not None:
        plain["passes"] = passes if isinstance(passes, str) else [str(step) for step in passes]
    return plain | {name: SETTINGS[name].plain(value) if name in SETTINGS else value for name, value in fields.items()}
