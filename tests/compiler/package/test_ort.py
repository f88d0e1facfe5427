"""`qcompile package --for ort`: one file where it is small, the library where it is of use, and how to open it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import Bench

from qcompile.compiler.package import ort as packaging
from qcompile.compiler.package.ort import package_ort
from qcompile.compiler.package.written import SUMS
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path


def test_a_small_model_is_one_file_that_its_readme_opens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bench.folder / "app"
    bench.compile(bench.save(tiny_decoder()))
    (bench.folder / "out" / "NOTICE").write_text("made by somebody")
    package_ort(bench.folder / "out/model.onnx", out)
    library = library_path().name
    assert {path.name for path in out.iterdir()} == {"model.onnx", library, "README.md", "LICENSES.txt", "NOTICE", SUMS}
    readme = (out / "README.md").read_text()
    monkeypatch.chdir(out)
    names: dict[str, Any] = {"onnxruntime": ort}
    for line in re.findall(r"`(.*?)`", readme)[:2]:
        exec(line, names)
    ids = np.arange(6)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    assert np.isfinite(names["running"].run(None, feeds)[0]).all()


def test_larger_weights_stay_beside_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = bench.save(tiny_decoder(), tokenizer=False), bench.folder / "app"
    monkeypatch.setattr(packaging, "_SMALL", 1000)
    files = package_ort(model, out).files
    assert [path.suffix for path in files[:2]] == [".onnx", ".data"]
    assert not (out / library_path().name).exists()


def test_the_same_again_and_from_its_own_folder(bench: Bench) -> None:
    model, out = bench.save(tiny_mlp(), tokenizer=False), bench.folder / "app"
    package_ort(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    package_ort(model, out)
    package_ort(out / "model.onnx", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    package_ort(out / "model.onnx", bench.folder / "other")
    assert {path.name for path in (bench.folder / "other").iterdir()} == before.keys()


def test_no_other_model_is_replaced(bench: Bench) -> None:
    model = bench.save(tiny_mlp(), tokenizer=False)
    with pytest.raises(UserError, match="of no earlier package"):
        package_ort(bench.save(tiny_mlp(), "other.onnx", tokenizer=False), model.parent)
    assert Path(model).exists()
