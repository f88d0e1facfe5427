"""Options of `qcompile completion`."""

from typing import Annotated, Literal

from qcompile.compiler.commands.options import Common, command, option, positional

Shell = Literal["bash", "zsh", "fish", "powershell"]


@command()
class Options(Common):
    """Print the completion script of a shell, or install it for this user (--install)."""

    shell: Annotated[Shell | None, positional("SHELL", "bash, zsh, fish or powershell (default: the one in use)")] = (
        None
    )
    install: Annotated[bool, option("write it where the shell finds it, and tell its startup file")] = False
