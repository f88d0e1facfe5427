"""Packages replace nothing but what packages wrote: over folders in which any files of anybody lie."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.compiler import cli
from qcompile.compiler.package.genai import package
from qcompile.compiler.package.kinds import KINDS
from qcompile.compiler.package.written import SUMS
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError

_SETTINGS = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What may lie in the way: nothing, somebody's file, what is to be written, a folder.
_KINDS = ("none", "none", "foreign", "same", "folder")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(make_bench: Callable[[str], Any]) -> dict[str, tuple[Path, Path, dict[str, bytes]]]:
    """By kind: the model, another model, and what its package holds."""
    bench, found = make_bench("packages"), {}
    model, other = (bench.save(tiny_decoder(kv_cache=True, seed=seed), f"{seed}/m.onnx") for seed in range(2))
    for path in (model, other):
        (path.parent / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 256}')
        (path.parent / "generation_config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    for kind, write in KINDS.items():
        out = bench.folder / kind
        write(model, out)
        found[kind] = (model, other, _files(out))
    return found


@pytest.mark.parametrize("kind", list(KINDS))
@_SETTINGS
@given(data=st.data())
def test_nothing_of_anybody_else_is_replaced(made: Any, kind: str, tmp_path: Path, data: st.DataObject) -> None:
    """Either an error that names a file, and nothing has changed; or all is there, and what was foreign, too."""
    model, other, wanted = made[kind]
    folder = tmp_path / hashlib.sha256(repr(data).encode()).hexdigest()
    shutil.rmtree(folder, ignore_errors=True)
    if data.draw(st.booleans(), label="packaged before"):
        KINDS[kind](other, folder)
    names = sorted(name for name in wanted if not name.endswith(".data"))
    for name in names:
        lies, path = data.draw(st.sampled_from(_KINDS), label=name), folder / name
        if lies == "none":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if lies == "folder":
            path.unlink(missing_ok=True)
            path.mkdir()
        else:
            path.write_bytes(b"mine" if lies == "foreign" else wanted[name])
    (folder / "notes.txt").parent.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    before = _files(folder)
    told = ""
    try:
        KINDS[kind](model, folder)
    except UserError as error:
        told = str(error)
    if told:
        assert str(folder) in told
        assert _files(folder) == before
    else:
        after = _files(folder)
        assert {name: content for name, content in after.items() if content == b"mine"} == {
            name: content for name, content in before.items() if content == b"mine"
        }
        assert all(after[name] == wanted[name] for name in names if name not in (SUMS, "config.json"))
        KINDS[kind](other, folder)  # what was written is known
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_record_is_one_that_sha256sum_reads(made: Any, kind: str, tmp_path: Path) -> None:
    model, other, _ = made[kind]
    for source in (model, other):
        KINDS[kind](source, tmp_path)
        checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_compile_for_genai_says_so_before_the_work(made: Any, tmp_path: Path, capsys: Any) -> None:
    """And a package that was compiled there may be compiled again; files that were changed since may not be."""
    model = made["genai"][0]
    command = [str(model), "--passes", "pack", "--group-size", "32", "--for", "genai", "-o", str(tmp_path)]
    for name in ("tokenizer.json", "model.onnx", SUMS):
        (tmp_path / name).write_text("mine")
        assert cli.main(command) == 2
        assert f"{tmp_path / name} is" in capsys.readouterr().err
        assert _files(tmp_path) == {name: b"mine"}
        (tmp_path / name).unlink()
    assert cli.main(command) == cli.main(command) == 0
    package(tmp_path / "model.onnx", tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {}, "search": {"top_k": 3}}')
    assert cli.main(command) == 2
    assert "genai_config.json is of no earlier package, or was changed since" in capsys.readouterr().err


def _compiled(model: Path, folder: Path) -> int:
    return cli.main([str(model), "--passes", "pack", "--group-size", "32", "-o", str(folder / "model.onnx")])


@pytest.mark.parametrize("kind", ["genai", "ort"])
def test_a_compiled_model_is_replaced_by_compiles_alone(made: Any, kind: str, tmp_path: Path) -> None:
    """It took hours perhaps, and its report lies beside it; so is one that was compiled where a package was."""
    model, other, _ = made[kind]
    for packaged in (False, True):
        folder = tmp_path / str(packaged)
        if packaged:
            KINDS[kind](other, folder)
        assert _compiled(model, folder) == 0
        before = _files(folder)
        with pytest.raises(UserError, match=r"model\.onnx is of no earlier package"):
            KINDS[kind](other, folder)
        assert _files(folder) == before
    KINDS[kind](folder / "model.onnx", folder)
    assert _files(folder)["model.onnx"] == before["model.onnx"]
    assert "model.onnx" not in (folder / SUMS).read_text(), "a compile wrote it"


def test_for_genai_replaces_what_the_report_tells_of(made: Any, tmp_path: Path, capsys: Any) -> None:
    """A report of another model there says nothing of model.onnx."""
    model, other, _ = made["genai"]
    command = [str(other), "--passes", "pack", "--group-size", "32", "--for", "genai", "-o", str(tmp_path)]
    assert _compiled(model, tmp_path) == cli.main(command) == 0
    report = tmp_path / "model.report.json"
    report.write_text(report.read_text().replace('"model.onnx"', '"m.onnx"'))
    assert cli.main(command) == 2
    assert "model.onnx is of no earlier package" in capsys.readouterr().err


def test_packages_without_a_record_are_told_of(made: Any, tmp_path: Path) -> None:
    model, other, _ = made["genai"]
    package(other, tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(UserError, match="packages of earlier versions have no SHA256SUMS: remove the folder"):
        package(model, tmp_path)


def test_an_interrupt_between_two_files_leaves_none_that_nobody_knows(
    made: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model, other, _ = made["genai"]
    package(other, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "qcompile.compiler.package.folder.publish.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            package(model, tmp_path)
    package(model, tmp_path)
    assert (tmp_path / "model.onnx").is_file()
