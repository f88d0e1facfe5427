"""compiler/settings/setting.py and commands/options.py: one declaration, and all that follows from it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from qcompile.compiler.commands import options
from qcompile.compiler.commands.parse import parse
from qcompile.compiler.settings.setting import About, settings, table
from qcompile.compiler.settings.steps import Step
from qcompile.passes.errors import UserError


@dataclass(frozen=True)
class Declared:
    """A field of every kind."""

    depth: Annotated[int | None, About("how deep (default: {default})", "a", word="auto", least=2)] = None
    share: Annotated[float, About("how much", "a", least=0, most=1, besides=(7,))] = 0.5
    level: Annotated[Literal[4, 8] | Step | None, About("how fine", "a", word="keep")] = 8
    way: Annotated[Literal["up", "down"], About("which way", "b")] = "up"
    calm: Annotated[bool, About("quietly", "b", opposite=("--loud", "loudly"))] = False
    names: Annotated[tuple[str, ...], About("whose", "b", metavar="NAME")] = ()
    limit: Annotated[float | None, About("100 % at most", "b", metavar="DB", positive=True)] = None


OWN = settings(Declared)


@pytest.mark.parametrize(
    ("name", "plain", "value"),
    [
        ("depth", "auto", None),
        ("depth", None, None),
        ("depth", 3, 3),
        ("share", 1, 1),
        ("share", 7, 7),
        ("level", "keep", None),
        ("level", "nf4(group=16)", Step("nf4", {"group": 16})),
        ("way", "down", "down"),
        ("calm", True, True),
        ("names", "a", ("a",)),
        ("names", ["a", "b"], ("a", "b")),
        ("limit", None, None),
    ],
)
def test_values_of_files(name: str, plain: Any, value: Any) -> None:
    read = OWN[name].read(plain, "here")
    OWN[name].check(read)
    assert read == value
    assert OWN[name].read(OWN[name].plain(read), "here") == value


@pytest.mark.parametrize(
    ("name", "plain", "message"),
    [
        ("depth", "deep", "here: depth must be int, got 'deep'"),
        ("depth", "", "here: depth must be int, got ''"),
        ("depth", True, "here: depth must be int, got True"),
        ("depth", 1, "depth must be at least 2, got 1"),
        ("share", "x", "here: share must be int or float, got 'x'"),
        ("share", 1.5, "share must lie between 0 and 1, got 1.5"),
        ("share", float("nan"), "share must lie between 0 and 1, got nan"),
        ("level", 5, "level takes 4, 8, a weight format or keep, got 5"),
        ("level", 4.0, "here: level must be int, got 4.0"),
        ("level", "nf4(", "cannot read 'nf4(' in here: level: expected name or name(key=value, …)"),
        ("way", "left", "way takes up or down, got 'left'"),
        ("way", None, "here: way must be str, got None"),
        ("calm", 1, "here: calm must be bool, got 1"),
        ("names", ["a", 1], "here: names must be a list of patterns, got ['a', 1]"),
        ("limit", 0, "limit must be a positive number, got 0"),
        ("limit", float("inf"), "limit must be a positive number, got inf"),
    ],
)
def test_what_is_wrong_is_told(name: str, plain: Any, message: str) -> None:
    with pytest.raises(UserError) as told:
        OWN[name].check(OWN[name].read(plain, "here"))
    assert str(told.value) == message


def _options(*headings: str) -> Any:
    return options.command(*(headings or ("a", "b")))(type("Options", (options.Common,), {"__doc__": "Everything."}))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (["--depth", "3"], {"depth": 3}),
        (["--depth", "auto", "--share", "0.25"], {"depth": "auto", "share": 0.25}),
        (["--level", "8", "--way", "down"], {"level": 8, "way": "down"}),
        (["--level", "nf4(group=16)"], {"level": "nf4(group=16)"}),
        (["--calm", "--names", "a", "--names", "b"], {"calm": True, "names": ["a", "b"]}),
        (["--loud", "--limit", "3"], {"calm": False, "limit": 3.0}),
        ([], {}),
    ],
)
def test_options(monkeypatch: pytest.MonkeyPatch, given: list[str], plain: dict[str, Any]) -> None:
    monkeypatch.setattr(options, "SETTINGS", OWN)
    taken = vars(parse("x", _options(), given))
    assert {name: value for name, value in taken.items() if name in OWN and value is not None} == plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--depth", "x"], "--depth: expected an integer or auto, got 'x'"),
        (["--level", "5"], "--level: expected 4, 8, a weight format or keep, got '5'"),
        (["--share", "x"], "--share: expected a number, got 'x'"),
        (["--way", "left"], "--way: expected up or down, got 'left'"),
        (["--calm", "--loud"], "--loud is there twice, or with its opposite"),
    ],
)
def test_options_that_are_wrong(monkeypatch: pytest.MonkeyPatch, given: list[str], message: str) -> None:
    monkeypatch.setattr(options, "SETTINGS", OWN)
    with pytest.raises(UserError) as told:
        parse("x", _options(), given)
    assert str(told.value) == f"{message} (see qcompile x --help)"


def test_help_and_documentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options, "SETTINGS", OWN)
    assert parse("x", _options("a"), ["--help"]) is None
    shown = capsys.readouterr().out
    assert "--depth {auto}" in shown
    assert "how deep (default: auto)" in shown
    assert "--level {4,8,FORMAT,keep}" in shown
    assert "--way" not in shown
    assert table(Declared).splitlines()[2:] == [
        "| `depth` | `--depth` | at least 2 or auto | `auto` | how deep |",
        "| `share` | `--share` | 0 to 1, or 7 | `0.5` | how much |",
        "| `level` | `--level` | 4, 8, a weight format or keep | `8` | how fine |",
        "| `way` | `--way` | up or down | `up` | which way |",
        "| `calm` | `--calm`, `--loud` | true or false | `false` | quietly |",
        "| `names` | `--names` | patterns |  | whose |",
        "| `limit` | `--limit` | above 0 |  | 100 % at most |",
    ]
