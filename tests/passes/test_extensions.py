"""passes/extensions.py: rows of other packages, and what becomes of packages that cannot be used."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installing import install
from said import complaints

from qcompile.compiler.cli import main
from qcompile.compiler.plan import build, packages
from qcompile.compiler.recipe import Recipe, parse_passes, parse_step
from qcompile.models.tiny import tiny_decoder
from qcompile.passes import extensions, formats
from qcompile.passes.errors import UserError
from qcompile.passes.formats import BY_NAME, by_operator
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.table import PASSES

TABLES = {"passes": PASSES, "observers": OBSERVERS, "formats": BY_NAME}
GOOD = {
    "passes": """
from qcompile.passes.base import Pass
from typing import Annotated
from qcompile.passes.extensions import OneOf
from qcompile.passes.observers import OBSERVERS
class Own(Pass):
    "Does nothing."
    name = "own"
    def __init__(self, *, share: float = 0.5, by: Annotated[str, OneOf(OBSERVERS)] = "mse"):
        super().__init__()
        self.by = by
    def call(self, region): pass
""",
    "observers": """
from qcompile.passes.observers.extremes import MinMax
class Own(MinMax):
    "Everything, again."
    name = "own"
""",
    "formats": """
from qcompile.passes.formats.tables import TableGrid, Tables
from qcompile.passes.spec import PerGroup
class Own(Tables):
    "Levels of another package."
    name, words = "own", ("Own",)
    def table(self, word): return (0.0, 1.0, -1.0)
    def lower(self, model, node, cache): pass
    def grid(self, target, *, group: int = 16): return TableGrid("own", (0.0, 1.0, -1.0), PerGroup(group))
""",
}
Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Install packages of a module each: their code, and entry points by group."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(extensions, "distributions", lambda: importlib.metadata.distributions(path=[str(site)]))
    modules: list[str] = []

    def clear() -> None:
        for made in (extensions._outside, extensions._entries, formats._operators_outside):
            made.cache_clear()
        for table in TABLES.values():
            table._loaded.clear()
        for module in modules:
            sys.modules.pop(module, None)

    def made(name: str, code: str, **entries: dict[str, str]) -> None:
        clear()
        modules.append(name.replace("-", "_"))
        told = "\n".join(
            f'[project.entry-points."qcompile.{group}"]\n'
            + "\n".join(f'"{key}" = "{value}"' for key, value in own.items())
            for group, own in entries.items()
        )
        project = f'[project]\nname = "{name}"\nversion = "2.5"\n{told}'
        install(site, {"pyproject.toml": project, f"{modules[-1]}.py": code})

    yield made
    clear()


def _listed(capsys: Any) -> tuple[int, str, str]:
    code = main(["passes"])
    said = capsys.readouterr()
    return code, said.out, complaints(said.err)


def test_every_table_takes_rows_of_other_packages(add: Add, capsys: Any) -> None:
    for group, code in GOOD.items():
        add(f"pack-{group}", code, **{group: {"own": f"pack_{group}:Own"}})
    code, out, err = _listed(capsys)
    assert (code, err) == (0, "")
    assert re.findall(r"^own +(.*)$", out, re.MULTILINE) == [
        f"{told} (from pack-{group} 2.5){parameters}"
        for told, group, parameters in (
            ("Does nothing.", "passes", " (share=0.5, by=mse)"),
            ("Everything, again.", "observers", ""),
            ("Levels of another package.", "formats", " (group=16)"),
        )
    ]
    assert "share=0.5, by=mse" in out
    assert "group=16" in out
    for table in TABLES.values():
        assert list(table)[-1] == "own"
        assert "own" in table
        assert len(table) == len(list(table))
    assert by_operator("MatMulOwn") is BY_NAME["own"]


def test_a_recipe_says_which_packages_it_needs(add: Add) -> None:
    for group, code in GOOD.items():
        add(f"pack-{group}", code, **{group: {"own": f"pack_{group}:Own"}})
    lists = {
        "pack": {},
        "own,pack": {"pack-passes": "2.5"},
        "qdq(observer=own)": {"pack-observers": "2.5"},
        "own(by=own),pack": {"pack-passes": "2.5", "pack-observers": "2.5"},
    }
    for passes, wanted in lists.items():
        assert packages(Recipe(passes=parse_passes(passes))) == wanted
    assert packages(Recipe(lm_head=parse_step("own(group=8)"))) == {"pack-formats": "2.5"}
    assert build(Recipe(passes=parse_passes("own(by=own),pack")))[1].by == "own"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"parameter by takes 'gram' or .* or 'own', got 'mze'"):
        build(Recipe(passes=parse_passes("own(by=mze),pack")))


@pytest.mark.parametrize(
    ("group", "entry", "code", "reason"),
    [
        ("passes", "own = m:Own", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("passes", "own = m:Own", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("passes", "own = m:Own", "class Other: pass", "AttributeError: module 'm' has no attribute 'Own'"),
        ("passes", "own = m", "", "it is not a class that derives from qcompile.passes.base.Pass"),
        ("passes", "own = m:Own", "class Own: pass", "it is not a class that derives from qcompile.passes.base.Pass"),
        ("passes", "own = m:Own", GOOD["observers"], "not a class that derives from qcompile.passes.base.Pass"),
        ("passes", "own = m:Own", GOOD["passes"].replace("def call", "def cal"), "its class leaves out call"),
        ("passes", "other = m:Own", GOOD["passes"], "its class has the name 'own', its entry point 'other'"),
        ("passes", "own = m:Own", GOOD["passes"].replace("share: float = 0.5", "share"), "share needs a type"),
        ("passes", "own = m:Own", GOOD["passes"].replace("float = ", "flaot = "), "NameError: name 'flaot'"),
        ("passes", "my own = m:Own", GOOD["passes"].replace('"own"', '"my own"'), "a name has letters, digits"),
        ("observers", "own = m:Own", GOOD["passes"], "derives from qcompile.passes.observers.base.Observer"),
        ("observers", "own = m:Own", GOOD["observers"] + "    def __init__(self, a, b): pass", "TypeError: "),
        ("observers", "auto = m:Own", GOOD["observers"].replace('"own"', '"auto"'), "auto is the word for"),
        ("formats", "own = m:Own", GOOD["formats"].replace('"Own",', '"Int4",'), "MatMulInt4 is that of int4"),
        ("formats", "own = m:Own", GOOD["formats"].replace('"Own",', '"AddX",'), "MatMulAddX is read as a MatMulAdd"),
        ("formats", "own = m:Own", GOOD["formats"].replace("int = 16", "int"), "parameter of its grid needs a default"),
        ("formats", "own = m:Own", GOOD["formats"].replace('TableGrid("own"', 'TableGrid("my"'), "of format 'my'"),
        ("formats", "own = m:Own", GOOD["formats"] + '    native = ("Own",)', "native must be empty"),
        ("formats", "keep = m:Own", GOOD["formats"].replace('"own"', '"keep"'), "keep is the word for no format"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told(add: Add, capsys: Any, group: str, entry: str, code: str, reason: str) -> None:
    """In one line that names the distribution, behind the rows that can be."""
    name, _, value = entry.partition(" = ")
    add("m", code, **{group: {name: value}})
    code_, out, err = _listed(capsys)
    assert code_ == 2
    assert all(f"\n{own}" in f"\n{out}" for own in ("pack", "minmax", "int4"))
    assert err.count("\n") == 1
    assert err.startswith(
        f"qcompile: error: {TABLES[group].word} {name!r} of the package m 2.5 ({value}) cannot be used"
    )
    assert reason in err
    assert err.endswith("; mend or uninstall that package\n")
    with pytest.raises(UserError, match=r"the package m 2\.5"):
        TABLES[group][name]


@pytest.mark.parametrize("group", TABLES)
def test_a_name_has_one_owner(add: Add, capsys: Any, group: str) -> None:
    own = {"passes": "pack", "observers": "mse", "formats": "int4"}[group]
    add("one", GOOD[group], **{group: {"own": "one:Own", own: "one:Own"}})
    add("two", GOOD[group], **{group: {"own": "two:Own"}})
    word = TABLES[group].word
    told = {
        own: f"{word} {own!r} is qcompile's own, and the package one 2.5 adds another: uninstall that",
        "own": f"{word} 'own' is added by the package one 2.5 and the package two 2.5: uninstall all of them but one",
    }
    for name, line in told.items():
        with pytest.raises(UserError, match=re.escape(line)):
            TABLES[group][name]
    code, _, err = _listed(capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert all(line in err for line in told.values())


def test_operators_of_two_formats_are_told_where_they_are_read(add: Add) -> None:
    add("one", GOOD["formats"], formats={"own": "one:Own"})
    add("two", GOOD["formats"].replace('"own"', '"other"'), formats={"other": "two:Own"})
    assert by_operator("MatMulInt4") is BY_NAME["int4"]
    with pytest.raises(UserError, match=r"operator MatMulOwn is that of two .*other of two 2\.5 and own of one 2\.5"):
        by_operator("MatMulOwn")


def test_what_is_not_asked_for_stops_nothing(add: Add, bench: Any, capsys: Any) -> None:
    """Nor is it imported; and a recipe with it is refused before the work."""
    for group in TABLES:
        add(f"broken-{group}", "raise RuntimeError('oops')", **{group: {"own": f"broken_{group}:Own"}})
    source = bench.save(tiny_decoder(layers=1))
    assert bench.run(source, "--passes", "smooth,pack") == 0
    assert not any(module.startswith("broken") for module in sys.modules)
    capsys.readouterr()
    for options in (
        ["--passes", "own,pack"],
        ["--passes", "qdq(observer=own)"],
        ["--passes", "pack", "--weights", "own"],
    ):
        bench.refuses(capsys, source, options, r"of the package broken-\w+ 2\.5 .* cannot be used: RuntimeError: oops")


def test_a_package_whose_metadata_is_broken_is_no_reason_to_stop(add: Add, tmp_path: Path, caplog: Any) -> None:
    add("good", GOOD["passes"], passes={"own": "good:Own"})
    broken = tmp_path / "site" / "broken-1.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_bytes(b"[qcompile.passes]\n\xff = x")
    assert PASSES["own"].name == "own"
    assert "broken-1.dist-info cannot be read" in caplog.text


def test_nothing_is_read_before_it_is_needed() -> None:
    code = (
        "import sys, qcompile.compiler.commands.compile, qcompile.passes.extensions as own; "
        "sys.exit(own._entries.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
