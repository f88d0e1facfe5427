"""`qcompile package --for transformers.js`: names by type, weights in chunks, and the entries of config.json."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Bench

from qcompile.compiler import cli
from qcompile.compiler.package import web
from qcompile.compiler.package.web import package_web
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

_CONFIG = {"model_type": "llama", "hidden_size": 64, "eos_token_id": 2}


def _model(bench: Bench, model: ir.Model | None = None) -> Path:
    path = bench.save(tiny_decoder(kv_cache=True, outliers=False) if model is None else model)
    (path.parent / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    return path


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("dtype", "options", "name", "told"),
    [
        ("fp32", None, "model.onnx", "fp32"),
        ("fp16", None, "model_fp16.onnx", "fp16"),
        ("fp32", {}, "model_q4.onnx", "q4"),
        ("fp16", {}, "model_q4f16.onnx", "q4f16"),
        ("fp32", {"target": "matmulnbits"}, "model_q4.onnx", "q4"),
        ("fp32", {"bits": 8}, "model_quantized.onnx", "q8"),
        ("fp32", {"bits": 8, "target": "matmulnbits"}, "model_quantized.onnx", "q8"),
    ],
)
def test_a_model_is_called_by_its_type(
    bench: Bench, dtype: str, options: dict[str, Any] | None, name: str, told: str
) -> None:
    model = _model(bench, tiny_decoder(kv_cache=True, outliers=False, dtype=dtype))
    source, out = model, bench.folder / "web"
    if options is not None:
        bench.compile(model, **options)
        source = bench.folder / "out" / "model.onnx"
    package_web(source, out, tokenizer=model.parent)
    assert (out / "onnx" / name).exists()
    assert (out / "onnx" / f"{name}_data").exists()
    assert _config(out) == _CONFIG | {"transformers.js_config": {"dtype": told, "use_external_data_format": {name: 1}}}
    assert {path.name for path in out.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "LICENSES.txt", "onnx", "SHA256SUMS",
    }  # fmt: skip


def test_caches_state_what_empty_ones_are_made_of(bench: Bench) -> None:
    package_web(_model(bench), bench.folder / "web")
    graph = onnx.load(bench.folder / "web/onnx/model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence", 16]
    assert shapes["input_ids"][0] == shapes["logits"][0] == "batch_size"


@pytest.mark.parametrize("longest", [66_000, 70_000, 10**9])
def test_chunks_hold_the_same_weights(bench: Bench, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = _model(bench, tiny_decoder(outliers=False, ffn=32)), bench.folder / "web"
    monkeypatch.setattr(web, "_LONGEST", longest)
    package_web(model, out)
    files = sorted(path.name for path in (out / "onnx").iterdir())
    assert files == ["model.onnx", *[f"model.onnx_data{f'_{i}' if i else ''}" for i in range(len(files) - 1)]]
    assert _config(out)["transformers.js_config"]["use_external_data_format"] == {"model.onnx": len(files) - 1}
    assert all((out / "onnx" / name).stat().st_size <= longest for name in files[1:])
    assert (len(files) > 2) == (longest < 10**9)
    ids = np.arange(6)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    before, after = (session(path).run(None, feeds)[0] for path in (model, out / "onnx/model.onnx"))
    np.testing.assert_array_equal(before, after)


def test_several_types_share_a_folder_and_old_chunks_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = _model(bench), bench.folder / "web"
    bench.compile(model)
    with monkeypatch.context() as patch:
        patch.setattr(web, "_LONGEST", 70_000)
        package_web(model, out)
    chunks = len(list((out / "onnx").glob("model.onnx_data*")))
    assert chunks > 1
    package_web(bench.folder / "out/model.onnx", out, tokenizer=model.parent)
    own = _config(out)["transformers.js_config"]
    assert own == {"dtype": "q4", "use_external_data_format": {"model.onnx": chunks, "model_q4.onnx": 1}}
    package_web(model, out)
    assert sorted(path.name for path in (out / "onnx").glob("model.onnx*")) == ["model.onnx", "model.onnx_data"]


def test_encoders_have_no_caches_to_be_named(bench: Bench) -> None:
    package_web(_model(bench, tiny_encoder()), bench.folder / "web")
    assert (bench.folder / "web/onnx/model.onnx").exists()


def test_refusals(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = _model(bench), str(bench.folder / "web")
    for options, message in (
        (["--kernels", "native"], "takes no native kernels"),
        (["-o", str(model.parent)], "holds the model's own config.json"),
        (["--tokenizer", str(bench.folder)], "no tokenizer.json"),
    ):
        arguments = ["package", str(model), "--for", "transformers.js", *options]
        assert cli.main(arguments if "-o" in options else [*arguments, "-o", out]) == 2
        assert re.search(message, capsys.readouterr().err)
    (model.parent / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        package_web(model, out)
    renamed = tiny_decoder(kv_cache=True)
    for value in (*renamed.graph.inputs, *renamed.graph.outputs):
        value.name = str(value.name).replace("past_key_values", "cache")
    with pytest.raises(UserError, match=r"past_key_values\.%d\.key"):
        package_web(_model(bench, renamed), out)
    assert not Path(out).exists()


def test_a_weight_longer_than_browsers_take(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_LONGEST", 5_000)
    with pytest.raises(UserError, match="browsers take 2"):
        package_web(_model(bench), bench.folder / "web")
    assert not list((bench.folder / "web/onnx").iterdir())
