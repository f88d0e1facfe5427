"""What `qcompile export` refuses, in one line, and what it leaves behind when it is cut short."""

import builtins
import os
from pathlib import Path
from typing import Any

import pytest
from lazily import transformers

from qcompile.compiler.cli import main
from qcompile.compiler.commands import export as command
from qcompile.models import cache, hf, publish, trace, zoo
from qcompile.models.export import export_model
from qcompile.passes.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))


def export(source: str | Path, target: Path, **options: Any) -> None:
    export_model(source, target, open_model=command.open_model, **options)


def refusal(source: str | Path, target: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        export(source, target, **options)
    assert "\n" not in str(caught.value)
    assert not list(target.parent.glob(f".{target.name}-*")), "nothing temporary is left"
    return str(caught.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert "no zoo model (smollm2-135m" in refusal("no-such-thing", target)
    assert "no zoo model (smollm2-135m" in refusal("~no such user/model", target)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty", target)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "no weights" in refusal(tmp_path / "empty", target)
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"x")
    assert "transformers cannot load it" in refusal(tmp_path / "empty", target)
    assert "compile it with `qcompile" in refusal(tmp_path / "a.onnx", target)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, not really")
    assert "transformers cannot load it" in refusal(tmp_path / "bad.gguf", target)
    assert "--dtype is fp32 or fp16" in refusal("x", target, dtype="int8")
    assert "--logits is all or last" in refusal("x", target, logits="first", kv_cache=True)
    assert "add --kv-cache" in refusal("x", target, logits="last")
    assert not target.exists()


def test_only_decoders_score_the_last_row_alone(tmp_path: Path) -> None:
    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    told = refusal(tmp_path / "bert", tmp_path / "out", logits="last", kv_cache=True)
    assert told == "bert is no decoder of text alone: --logits last does not apply"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="the head of llama is no layer of its own: export it with --logits all"):
        trace.score_last_row(model)


def test_targets_that_may_not_be_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert "holds the source" in refusal(source, source)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(source, tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.onnx").write_text("precious")
    assert "was not written by `qcompile export`" in refusal(source, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "model.onnx").read_text() == "precious"


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert "install qcompile-onnx[export]" in refusal(tmp_path, tmp_path / "out")


def test_reasons_come_from_the_bottom_of_torchs_errors() -> None:
    told = (
        "Found the following conflicts between user-specified ranges and inferred ranges from model tracing:\n"
        "- Received user-specified dim hint Dim.DYNAMIC(min=None, max=None), but tracing inferred a static shape of 7 "
        "for dimension inputs['input_ids'].shape[1]."
    )
    error = RuntimeError("\x1b[96mThis is step 1/3\x1b[0m of exporting the model to ONNX. Next steps: …")
    error.__cause__ = ValueError(told)
    assert "would hold for one size only (dimension 1 of input_ids came out as 7)" in trace._reason(error)
    error.__cause__ = ValueError("\x1b[96mno such operator\x1b[0m\nat all")
    assert trace._reason(error) == "ValueError: no such operator at all"


def test_layers_out_of_range() -> None:
    class Config:
        num_hidden_layers, layer_types = 4, ("a", "b", "a", "b")

    config = Config()
    for layers in (0, 5):
        with pytest.raises(UserError, match=f"has 4 layers: cannot keep {layers}"):
            hf.cut_layers(config, layers)
    hf.cut_layers(config, 3)
    assert (config.num_hidden_layers, config.layer_types) == (3, ("a", "b", "a"))


def test_ready_models_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready.onnx"
    ready.write_bytes(b"an onnx file")
    monkeypatch.setattr(zoo, "fetch", lambda name: ready)
    export("rapidocr-cls", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"an onnx file"
    assert cache.sha256([ready]) in (tmp_path / "out" / "export.json").read_text()
    assert "copied as it is" in refusal("rapidocr-cls", tmp_path / "out", kv_cache=True)


def test_a_cut_while_moving_leaves_no_graph_beside_foreign_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "out", os.replace
    target.mkdir()
    for name in ("model.onnx", "model.onnx.data", "export.json"):
        (target / name).write_text("old")

    for survived in range(3):
        moved: list[str] = []

        def cut(source: Path, place: Path, moved: list[str] = moved, survived: int = survived) -> None:
            if len(moved) == survived:
                raise KeyboardInterrupt
            moved.append(Path(place).name)
            real(source, place)

        with publish.staging(target, "x") as work:
            for name in ("model.onnx", "model.onnx.data", "export.json"):
                (work / name).write_text("new")
            monkeypatch.setattr(os, "replace", cut)
            with pytest.raises(KeyboardInterrupt):
                publish.publish(work, target)
        monkeypatch.setattr(os, "replace", real)
        assert not (target / "model.onnx").exists()
        (target / "model.onnx").write_text("old")
        (target / "export.json").write_text("old")
    with publish.staging(target, "x") as work:
        (work / "model.onnx").write_text("new")
        publish.publish(work, target)
    assert (target / "model.onnx").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_command_lists_the_zoo_and_asks_for_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert "minilm-l6" in capsys.readouterr().out
    assert main(["export", "minilm-l6"]) == 2
    assert "-o DIR" in capsys.readouterr().err
