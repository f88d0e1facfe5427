"""Options of `qcompile recipe`."""

from pathlib import Path
from typing import Annotated

from qcompile.compiler.commands.options import Common, command, option, positional

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
