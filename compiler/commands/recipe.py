"""`qcompile recipe`: a recipe file checked and written out in full, and the schema that editors read."""

import json

from qcompile.compiler.commands.declared.recipe import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import console
from qcompile.compiler.plan import planned
from qcompile.compiler.recipe import Recipe, dump_recipe, load_recipe
from qcompile.compiler.settings.schema import schema
from qcompile.passes.formats import FORMATS


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
