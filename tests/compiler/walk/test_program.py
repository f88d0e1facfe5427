"""What names the programs of a compile: a change in any file that may compute its bytes is another name."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.compiler.walk import program
from qcompile.passes import extensions
from qcompile.passes.base import Pass
from qcompile.passes.smooth import Smooth

_PASS = "from qcompile.passes.smooth import Smooth\n\n\nclass Mine(Smooth):\n    pass\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; what is loaded from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _made(kind: type[Pass]) -> Pass:
    """One whose settings nobody looks at."""
    return kind.__new__(kind)


def test_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"compiler/walk/program.py": "", "passes/a.py": "a", "models/b.py": "b", "docs/c.py": "c"})
    monkeypatch.setattr(program, "__file__", str(tmp_path / "compiler" / "walk" / "program.py"))
    seen = {program.digest_of([])}
    assert seen == {program.digest_of([])}
    for name in ("passes/a.py", "models/b.py", "runtime/new.py"):
        _write(tmp_path, {name: "another"})
        seen.add(program.digest_of([]))
    assert len(seen) == 4
    _write(tmp_path, {"docs/c.py": "another"})
    assert program.digest_of([]) in seen


def test_all_files_of_a_package_whose_class_a_pass_is(site: Path) -> None:
    files = {"alien/__init__.py": "", "alien/steps/mine.py": _PASS, "alien/tables.py": "", "alien/fast.so": ""}
    _write(site, files)
    passes = [_made(importlib.import_module("alien.steps.mine").Mine)]
    seen = {program.digest_of([_made(Smooth)]), program.digest_of(passes)}
    for name in files:
        _write(site, {name: "# another\n"})
        seen.add(program.digest_of(passes))
    assert len(seen) == 2 + len(files)
    _write(site, {"alien/notes.txt": "no code"})
    assert program.digest_of(passes) in seen


def test_helpers_beside_a_lone_module(site: Path) -> None:
    _write(site, {"lone.py": f"import beside\n{_PASS}", "beside.py": "", "unused.py": ""})
    passes = [_made(importlib.import_module("lone").Mine)]
    first = program.digest_of(passes)
    _write(site, {"unused.py": "# not loaded\n"})
    assert program.digest_of(passes) == first
    _write(site, {"beside.py": "# another\n"})
    assert program.digest_of(passes) != first


def test_packages_that_add_formats_or_observers(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their classes are no pass's; they count once they are loaded."""
    _write(site, {"adding/__init__.py": "", "adding/grid.py": ""})
    monkeypatch.setattr(extensions, "modules", lambda: {"adding"})
    before = program.digest_of([_made(Smooth)])
    importlib.import_module("adding")
    loaded = program.digest_of([_made(Smooth)])
    _write(site, {"adding/grid.py": "# another\n"})
    assert len({before, loaded, program.digest_of([_made(Smooth)])}) == 3


def test_a_class_without_a_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _made(type("Typed", (Smooth,), {"__module__": "nowhere", "name": "typed"}))
    with pytest.raises(program.Unnamed, match="pass typed has no file"):
        program.digest_of([made])
