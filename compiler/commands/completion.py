"""`qcompile completion`: what a shell needs to complete commands, options and their values."""

from typing import Annotated, Literal

from cyclopts import App

from qcompile.compiler.commands.options import Common, Document, command, option, positional
from qcompile.compiler.commands.parse import application
from qcompile.compiler.commands.table import COMMANDS, load
from qcompile.compiler.console.terminal import console
from qcompile.passes.errors import UserError

Shell = Literal["bash", "zsh", "fish", "powershell"]


@command()
class Options(Common):
    """Print the completion script of a shell, or install it for this user (--install)."""

    shell: Annotated[Shell | None, positional("SHELL", "bash, zsh, fish or powershell (default: the one in use)")] = (
        None
    )
    install: Annotated[bool, option("write it where the shell finds it, and tell its startup file")] = False


def run(args: Options) -> Document:
    """Print or install the script."""
    from cyclopts.completion import ShellDetectionError, detect_shell

    try:
        shell = args.shell or detect_shell()
    except ShellDetectionError as error:
        raise UserError("which shell is it? give one: qcompile completion bash") from error
    made = _whole()
    if args.install:
        path = made.install_completion(shell=shell)
        console().print(f"wrote {path}; a new shell completes qcompile", soft_wrap=True)
        return {"shell": shell, "path": str(path)}
    script = made.generate_completion(shell=shell)
    if not console(answer=True).quiet:
        print(script, end="" if script.endswith("\n") else "\n")
    return {"shell": shell, "script": script}


def _whole() -> App:
    """All commands in one application; words that are none are options of compile."""
    made = application("qcompile", load("compile").Options)
    for name in COMMANDS:
        made.command(application(name, load(name).Options))
    return made
