"""Every command that the documentation shows is one that the command line takes: its options, passes and settings."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.compiler.commands.options import recipe_of
from qcompile.compiler.commands.parse import parse
from qcompile.compiler.commands.table import COMMANDS, load
from qcompile.compiler.plan import planned
from qcompile.passes.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`(qcompile [^`\n]+)`")
# Words that stand for something, and commands whose passes another package adds (docs/extending.md).
_PLACEHOLDER = re.compile(r"…|\bCOMMAND\b|\b(?:N|NATS|DB|LIST|FILE|NAME|DIR|STATS|FOLDER)\b")
_FOREIGN = re.compile("prune|deviation|bell4")


def shown(text: str) -> Iterator[list[str]]:
    """The words of every `qcompile …` in blocks of shell commands, and within sentences and tables."""
    for _, language, block in _BLOCK.findall(text):
        if language in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("qcompile "):
                    yield shlex.split(line.strip().removeprefix("$ "), comments=True)[1:]
    for code in _INLINE.findall(_BLOCK.sub("", text)):
        words = shlex.split(code)[1:]
        named = words[0] in COMMANDS and (len(words) == 1 or words[1].startswith("-"))  # a command, of no file
        if not named and not _PLACEHOLDER.search(code):
            yield words


def check(words: list[str]) -> None:
    """UserError for what the command line would refuse without looking at a file."""
    if words[0] in ("help", "--version", "-V") or words[1:] == ["--help"]:
        return
    name = words[0] if words[0] in COMMANDS else "compile"
    args = parse(name, load(name).Options, words[words[0] in COMMANDS :])
    if name == "compile" and args is not None and args.recipe is None and not _FOREIGN.search(" ".join(words)):
        planned(recipe_of(args))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
SHOWN = [
    (page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in shown(page.read_text(encoding="utf-8"))
]


def test_the_documentation_shows_commands() -> None:
    """Blocks and tables are found, those of the README's first minutes among them."""
    readme = [words for page, words in SHOWN if page == "README.md"]
    assert len(readme) > 25
    assert {words[0] for words in readme} >= {
        "export",
        "eval",
        "bench",
        "generate",
        "inspect",
        "sensitivity",
        "package",
    }
    assert len({page for page, _ in SHOWN}) > 8


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page}: {' '.join(words)}" for page, words in SHOWN])
def test_it_is_taken(page: str, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    "line", ["m.onnx --bitz 4", "m.onnx --passes pakc", "eval a.onnx --agains b.onnx", "m.onnx --bits 5", "bench"]
)
def test_a_wrong_one_is_told(line: str) -> None:
    text = f"```\nqcompile {line}\n```\n"
    (words,) = shown(text)
    with pytest.raises(UserError):
        check(words)
