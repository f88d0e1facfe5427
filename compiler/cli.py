"""The command line: `qcompile MODEL.onnx …` compiles; the other commands are named first."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from qcompile.compiler.commands.table import COMMANDS, declared, load
from qcompile.compiler.console.visible import visible
from qcompile.passes.errors import UserError, Verdict
from qcompile.passes.interrupts import heeded, uninterrupted
from qcompile.passes.near import did_you_mean

_BUG = 70  # EX_SOFTWARE of sysexits.h
# Options of every command, which may stand before it too; and those with a value behind them.
_FLAGS, _VALUED = {"-q", "--quiet", "-v", "-vv", "--verbose", "--traceback", "--json"}, {"--threads", "--log-level"}
_USAGE = "qcompile MODEL.onnx [options]\n       qcompile COMMAND …"
_EXAMPLES = """\
examples:
  qcompile export smollm2-135m -o smol
  qcompile smol/model.onnx --passes smooth,awq,pack -o small/model.onnx
  qcompile eval small/model.onnx --against smol/model.onnx --text novel.txt --tokenizer smol
  qcompile generate small/model.onnx --prompt "The capital of France is" --tokenizer smol

`qcompile COMMAND --help` tells a command's options. Exit codes: 0 done, 1 a bound that was
asked for is broken, 2 bad input, 70 a bug, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is None:  # closed by the shell (2>&-); libraries print there without asking
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        return _guarded(arguments)
    except BrokenPipeError:  # the reader went away: `qcompile inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _guarded(arguments: list[str]) -> int:
    """Every failure as one line on stderr, unless --traceback asks for more."""
    try:
        if sys.stdout is None:  # files opened from now on would take its number
            raise UserError("stdout is closed; send it to a file, or to /dev/null")
        with heeded():
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stopped:
        left = "the output was not written" if hasattr(stopped, "__notes__") else "nothing was written"
        told = f": {stopped}" if stopped.args else f", {left}"
        return _noted(stopped, _fail(f"interrupted{told}", 130))
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        _drop_output(error)
        return _noted(error, _explain(error))


def _noted(error: BaseException, code: int) -> int:
    """Print what is noted of a failure beside it: how a compile goes on; the exit code."""
    for note in getattr(error, "__notes__", ()):
        _fail(f"note: {note}", code)
    return code


def _drop_output(error: Exception) -> None:
    """What stdout could not take (a full disk) is not tried again when the interpreter ends."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException) -> int:
    """Print an exception as one line; the exit code."""
    if isinstance(error, UserError):
        return _fail(f"error: {error}", error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror}", 2)
    if isinstance(error, MemoryError):
        return _fail("error: out of memory: use fewer --samples or a shorter --context, or a larger machine", 2)
    kind = type(error).__name__
    return _fail(f"internal error: {kind}: {error} (this is a bug; run with --traceback and report it)", _BUG)


def _fail(message: str, code: int) -> int:
    """Print one line, names in it made visible; the exit code."""
    with contextlib.suppress(OSError):  # a full disk behind stderr: the code says it
        print("qcompile: " + visible(" ".join(message.split())), file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    options, rest = _leading(arguments)
    if rest[:1] == ["help"]:  # help COMMAND
        rest = [*([_default_command(rest[1])] if len(rest) > 1 and rest[1] not in COMMANDS else rest[1:2]), "--help"]
    if not rest or rest[0] in ("-h", "--help", "--version", "-V"):
        return _top_level(rest)
    name = rest.pop(0) if rest[0] in COMMANDS else _default_command(rest[0])
    args = _parsed(name, [*rest, *options])
    if args is None:  # after --help
        return 0
    _start_logging(args)
    try:
        _answered(load(name), args)
        return 0
    except SystemExit as exit:  # nothing here calls it: a module of the user's, a library
        if isinstance(exit.__context__, BrokenPipeError):  # rich, where the reader of a list went away
            raise exit.__context__ from None
        raise UserError(f"code that {name} loaded ended it with sys.exit({exit.code!r}) before it was done") from exit


def _answered(module: Any, args: Any) -> None:
    """Run a command, and print its document where one is asked for (--json without a file)."""
    from qcompile.compiler.console.document import written
    from qcompile.compiler.console.terminal import voice

    wanted = args.json is True or args.json == []
    with voice(quiet=args.quiet, document=wanted), _within(args):
        try:
            document = _judged(module, args)
        except Verdict as broken:
            if wanted and broken.document is not None:
                print(written(broken.document))
            raise
    if wanted:
        print(written(document))


@contextlib.contextmanager
def _within(args: Any) -> Iterator[None]:
    """What holds for a whole command: its custom operators in every session, and how many threads there may be."""
    from qcompile.passes.threads import limited

    with contextlib.ExitStack() as stack:
        if getattr(args, "custom_ops", None):
            from qcompile.runtime.sessions import custom_operators

            stack.enter_context(custom_operators(args.custom_ops))
        if isinstance(args.threads, int):  # bench takes several numbers, and sees to them itself
            from threadpoolctl import threadpool_limits

            stack.enter_context(limited(args.threads))
            stack.enter_context(threadpool_limits(limits=args.threads))
        if getattr(args, "cluster", None):
            from qcompile.runtime.cluster import clustered

            stack.enter_context(clustered(args.cluster))
        yield


def _judged(module: Any, args: Any) -> Any:
    """Run a command; what fails without being told as a UserError may be the file's fault."""
    from qcompile.compiler.facts.memory import bounded

    try:
        with bounded(), warnings.catch_warnings():
            if not args.verbose:  # numpy's remarks on odd weights are no part of an answer in one line
                warnings.simplefilter("ignore")
            return module.run(args)
    except (UserError, OSError, MemoryError):
        raise
    except Exception:
        _blame(getattr(args, "model", None))
        raise


def _blame(model: Any) -> None:
    """Raise UserError where ONNX Runtime refuses the model file: a failure here is then the file's, and no bug.

    `load_model` checks what a file says about itself. That attributes, ranks and types fit each operator is known to
    ONNX Runtime alone, whose word on every file would cost its whole size in memory: it is asked when something failed.
    """
    if isinstance(model, (str, os.PathLike)) and os.path.isfile(model):
        from qcompile.runtime.sessions import session

        session(os.fspath(model), optimize=False, kernels="portable")


def _top_level(rest: list[str]) -> int:
    if rest and rest[0] in ("--version", "-V"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"qcompile {version('qcompile-onnx')}")
        except PackageNotFoundError:
            print("qcompile (not installed)")
        return 0
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    print(f"usage: {_USAGE}\n\nAn ONNX quantization compiler.\n\ncommands:\n{commands}\n\n{_EXAMPLES}")
    return 0 if rest else 2


def _default_command(first: str) -> str:
    """compile, unless the word looks like a mistyped command."""
    if not first.startswith("-") and "." not in first and os.sep not in first and not os.path.exists(first):
        hint = did_you_mean(first, COMMANDS, f"commands: {', '.join(COMMANDS)}; or give a MODEL.onnx")
        raise UserError(f"no command {first!r} and no such file: {hint}")
    return "compile"


def _leading(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options that stand before the command, the rest)."""
    count = 0
    while count < len(arguments):
        word = arguments[count]
        count += 2 if word in _VALUED else 1
        if word.split("=")[0] not in _FLAGS | _VALUED:
            count -= 1
            break
    return arguments[:count], arguments[count:]


def _parsed(name: str, words: list[str]) -> Any:
    """The options of a command; None behind its help."""
    with uninterrupted():
        from qcompile.compiler.commands.parse import parse
    return parse(name, declared(name), words)


def _start_logging(args: Any) -> None:
    chosen = args.log_level or ("error" if args.quiet else ("warning", "info", "debug")[min(args.verbose, 2)])
    logging.basicConfig(level=chosen.upper(), format="%(name)s: %(message)s", stream=sys.stderr)
    if (
        not args.verbose and args.log_level is None
    ):  # what a library remarks on a file is no part of an answer in one line
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its tables


if __name__ == "__main__":
    sys.exit(main())
