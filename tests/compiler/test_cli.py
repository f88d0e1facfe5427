"""compiler/cli.py: choosing commands, one line for every failure, exit codes."""

import io
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest

from qcompile.compiler import cli
from qcompile.compiler.cli import COMMANDS, main
from qcompile.compiler.commands.options import Common, command, option, positional
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import console, table
from qcompile.passes.errors import BrokenPromise, UserError, Verdict

Fake = Callable[[Callable[[Any], int]], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace every command's module by one that runs the given function."""

    def install(body: Callable[[Any], int]) -> None:
        def module(name: str) -> Any:
            @command()
            class Options(Common):
                command = name
                model: Annotated[str | None, positional("MODEL.onnx", "a model")] = None
                passes: Annotated[str | None, option("passes", "PASSES")] = None

            return types.SimpleNamespace(Options=Options, run=body)

        monkeypatch.setattr(cli, "load", module)
        monkeypatch.setattr(cli, "declared", lambda name: module(name).Options)

    return install


def _raise(error: BaseException) -> Callable[[Any], int]:
    def body(args: Any) -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["model.onnx", "--passes", "pack"], "compile"),
        (["--passes", "pack", "model.onnx"], "compile"),
        (["-v", "model.onnx"], "compile"),
        (["compile", "model.onnx"], "compile"),
        (["eval", "model.onnx", "-v"], "eval"),
        (["--traceback", "inspect", "model.onnx"], "inspect"),
    ],
)
def test_without_a_command_the_model_is_compiled(fake: Fake, arguments: list[str], command: str) -> None:
    seen: list[Any] = []
    fake(lambda args: seen.append(args) or 0)  # type: ignore[func-returns-value]
    assert main(arguments) == 0
    assert (seen[0].command, seen[0].model) == (command, "model.onnx")
    assert seen[0].verbose == arguments.count("-v")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad\n  thing"), 2, "qcompile: error: bad thing"),
        (FileNotFoundError(2, "No such file or directory", "x.onnx"), 2, "error: x.onnx: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "qcompile: error: No space left on device"),
        (MemoryError(), 2, "out of memory: use fewer --samples"),
        (KeyboardInterrupt(), 130, "qcompile: interrupted, nothing was written"),
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops (this is a bug; run with --traceback"),
    ],
)
def test_failures_are_one_line(
    fake: Fake, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    fake(_raise(error))
    assert main(["eval", "model.onnx"]) == code
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("oops"), 70),
        (UserError("bad"), 2),
        (Verdict("worse than asked"), 1),
        (BrokenPromise("own", "broken"), 70),
        (OSError(), 70),
    ],
)
def test_traceback_changes_no_exit_code(
    fake: Fake, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    fake(_raise(error))
    assert main(["eval", "model.onnx"]) == main(["eval", "model.onnx", "--traceback"]) == code
    told = capsys.readouterr().err
    assert told.count("Traceback (most recent call last)") == 1
    assert told.count(type(error).__name__) >= 1


@pytest.mark.parametrize("code", [0, 3, None, "done"])
def test_an_exit_within_a_command_is_no_success(fake: Fake, capsys: pytest.CaptureFixture[str], code: Any) -> None:
    """A user's module that calls sys.exit() once ended a compile with exit code 0 and no output."""
    fake(_raise(SystemExit(code)))
    assert main(["eval", "model.onnx"]) == 2
    assert capsys.readouterr().err.startswith("qcompile: error: code that eval loaded ended it with sys.exit(")


def test_names_in_messages_show_their_control_characters(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(_raise(UserError("node \x1b[31mred\x07\u202e \udcff")))
    assert main(["eval", "model.onnx"]) == 2
    assert capsys.readouterr().err == "qcompile: error: node \\u001b[31mred\\u0007\\u202e \\udcff\n"


def test_names_on_the_console_show_their_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    out = console()
    out.print("a\x1b[2Jb\r\ud800")
    rows = table("name")
    rows.add_row("c\x9b\n")
    out.print(rows)
    shown = capsys.readouterr().out
    assert "a\\u001b[2Jb\\u000d\\ud800\n" in shown
    assert "c\\u009b\\u000a" in shown


_CLOSED = "import sys; from qcompile.compiler import cli; sys.exit(cli.main(['passes']))"


def test_closed_streams() -> None:
    def run(redirection: str) -> subprocess.CompletedProcess[str]:
        line = f'"{sys.executable}" -c "{_CLOSED}" {redirection}'
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60)

    done = run(">&-")
    assert (done.returncode, done.stderr) == (
        2,
        "qcompile: error: stdout is closed; send it to a file, or to /dev/null\n",
    )
    done = run("2>&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pack" in done.stdout
    if Path("/dev/full").exists():
        done = run(">/dev/full")
        assert (done.returncode, done.stderr) == (2, "qcompile: error: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evla"], "no command 'evla' and no such file: did you mean 'eval'?"),
        (["xyzzy"], "commands: compile, calibrate, passes"),
        (["eval", "model.onnx", "--pases", "x"], "no option --pases: did you mean '--passes'?"),
        (["eval", "model.onnx", "--pass", "x"], "no option --pass: did you mean '--passes'?"),
    ],
)
def test_bad_arguments_are_bad_input(
    fake: Fake, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    fake(lambda args: 0)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)
    assert "examples:" in shown
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert "qcompile " in capsys.readouterr().out
    for name in ("eval", "inspect", "generate"):
        assert main([name, "--help"]) == 0
        assert "--traceback" in capsys.readouterr().out


def test_help_imports_no_numeric_library() -> None:
    code = (
        "import sys; from qcompile.compiler.cli import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_help_of_every_command_loads_nothing_that_runs_it() -> None:
    """Its options are declared apart: the second that onnx and the passes take is not spent on help."""
    code = (
        "import sys; from qcompile.compiler.cli import COMMANDS, main\n"
        "for name in COMMANDS: assert main([name, '--help']) == 0\n"
        "homes = ('qcompile.compiler.commands', 'qcompile.compiler.recipe', 'qcompile.compiler.settings',"
        " 'qcompile.compiler.cli', 'qcompile.compiler.console')\n"
        "own = [m for m in sys.modules if m.startswith('qcompile.compiler.') and not m.startswith(homes)]\n"
        "slow = [m for m in ('numpy', 'onnx', 'onnx_ir', 'onnxscript', 'rich', 'yaml', 'msgspec', 'torch', 'psutil')"
        " if m in sys.modules]\n"
        "print(own + slow, file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert process.stderr == "[]\n"
    assert process.stdout.count("usage: qcompile") == len(COMMANDS)


@pytest.mark.parametrize("printer", ["print", "rich.print"])
def test_a_reader_that_goes_away_is_no_error(printer: str) -> None:
    code = (
        "import sys, types, rich; from qcompile.compiler import cli\n"
        "from qcompile.compiler.commands.options import Common, command\n"
        f"def run(args):\n    for _ in range(100): {printer}('line ' * 1000)\n    return 0\n"
        "Options = command()(type('Options', (Common,), {'__doc__': 'x'}))\n"
        "cli.load, cli.declared = lambda name: types.SimpleNamespace(run=run), lambda name: Options\n"
        "sys.exit(cli.main(['inspect']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_tables_in_a_pipe_keep_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/".join(["model.layers.10.self_attention.query_projection"] * 6)
    shown = table("name", "size", numbers=1)
    shown.add_row(name, megabytes(1_500_000))
    console().print(shown)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == [name, "1.5", "MB"]


@pytest.mark.parametrize("width", [30, 60, 100])
def test_tables_on_a_narrow_terminal_keep_names_whole(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    path = "exported/smollm2-135m/model-int4-of-a-long-name.onnx"
    shown = table("model", "why", "size", numbers=1)
    shown.add_row(path, "it is left in float, for its rows are shorter than a group", "91.2 MB")
    out = console()
    out.print(shown)
    assert out.width == width
    lines = re.sub("\x1b\\[\\d*m", "", stream.getvalue()).splitlines()
    assert sum(path in line for line in lines) == 1
    assert all(word in stream.getvalue() for word in ("shorter", "91.2 MB"))
    assert all(len(line.rstrip()) <= max(width, len(path) + 40) for line in lines)
