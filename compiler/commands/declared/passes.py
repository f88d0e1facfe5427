"""Options of `qcompile passes`."""

from typing import Annotated

from qcompile.compiler.commands.options import Common, command, positional


@command()
class Options(Common):
    """The passes, the observers (for qdq(observer=NAME)) and the weight formats (for --weights NAME), with their
    parameters; those of other packages with the package that adds them."""

    name: Annotated[str | None, positional("PASS", "this one alone, with the small passes that it is made of")] = None
