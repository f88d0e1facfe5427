"""`qcompile recipe`: a recipe file checked and written out in full, and the schema that editors read."""

import json
from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, Document, command, option, positional
from qcompile.compiler.console.terminal import console
from qcompile.compiler.plan import planned
from qcompile.compiler.recipe import Recipe, dump_recipe, load_recipe
from qcompile.compiler.settings.schema import schema
from qcompile.passes.formats import FORMATS

_EPILOG = """examples:
  qcompile recipe mine.yaml                     # every setting of it, or what is wrong with it
  qcompile recipe --schema > recipe.schema.json
A first line `# yaml-language-server: $schema=recipe.schema.json` has editors complete and check a recipe."""


@command()
class Options(Common):
    """Check a recipe file and print it with all defaults; without a file, the defaults themselves."""

    epilog = _EPILOG

    file: Annotated[Path | None, positional("RECIPE", "a YAML or TOML file, as --recipe takes it")] = None
    schema: Annotated[bool, option("print the JSON schema of recipe files instead")] = False


def run(args: Options) -> Document:
    """Print the recipe, or the schema."""
    out = console(answer=True)
    if args.schema:
        made = recipe_schema()
        for line in json.dumps(made, indent=2).splitlines():
            out.print(line, soft_wrap=True)
        return made
    recipe = Recipe() if args.file is None else load_recipe(args.file)
    planned(recipe)
    for line in dump_recipe(recipe).splitlines():
        out.print(line, soft_wrap=True)
    return recipe.to_dict()


def recipe_schema() -> dict[str, object]:
    """The schema of recipe files, docs/recipe.schema.json."""
    return schema(Recipe, "Recipe", formats=", ".join(known.name for known in FORMATS))
