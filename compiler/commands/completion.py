"""`qcompile completion`: what a shell needs to complete commands, options and their values."""

from cyclopts import App

from qcompile.compiler.commands.declared.completion import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.commands.parse import application
from qcompile.compiler.commands.table import COMMANDS, declared
from qcompile.compiler.console.terminal import console
from qcompile.passes.errors import UserError


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
    made = application("qcompile", declared("compile"))
    for name in COMMANDS:
        made.command(application(name, declared(name)))
    return made
