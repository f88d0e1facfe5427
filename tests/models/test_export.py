"""Export of small transformers models, end to end: torch, ONNX, the check, the folder that appears."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lazily import torch, transformers

from qcompile.compiler.cli import main
from qcompile.compiler.commands import export as command
from qcompile.models import trace, zoo
from qcompile.models.export import export_model
from qcompile.models.tiny import tiny_decoder, tiny_tokenizer
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_embeddings, find_linears
from qcompile.runtime.sessions import session

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    tiny_tokenizer(256, folder)
    return folder


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "plain"
    export_model(llama, target, open_model=command.open_model)
    return target


@pytest.fixture(scope="module")
def last(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With caches, the head on the last row: as the command exports it for onnxruntime-genai."""
    target = tmp_path_factory.mktemp("out") / "last"
    assert main(["export", str(llama), "-o", str(target), "--for", "genai"]) == 0
    return target


def logits_of_torch(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def ids_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, length))


def test_decoder_agrees_with_torch_at_other_sizes(llama: Path, plain: Path) -> None:
    opened = session(plain / "model.onnx")
    for batch, length in ((1, 1), (3, 5), (1, 40)):
        ids = ids_of(batch, length)
        (found,) = opened.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        expected = logits_of_torch(llama, ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_decoder_graph_is_what_was_promised(plain: Path) -> None:
    names = {path.name for path in plain.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "export.json"}
    onnx.checker.check_model(str(plain / "model.onnx"))
    model = ir.load(plain / "model.onnx")
    assert model.ir_version <= 13
    assert model.opset_imports[""] == 21
    assert [str(dim) for dim in model.graph.outputs[0].shape] == ["batch", "sequence", "256"]
    linears, (embedding,) = find_linears(model.graph), find_embeddings(model.graph)
    assert len(linears) == 15
    assert linears[0].name == "model.layers.0.self_attn.q_proj"
    assert linears[0].weight.name == "model.layers.0.self_attn.q_proj.weight"
    assert linears[-1].name == "lm_head"
    assert linears[-1].weight is embedding.table, "a tied embedding is one tensor"
    weights = 256 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert (plain / "model.onnx.data").stat().st_size < 1.02 * 4 * weights


def test_record_says_what_was_done(llama: Path, plain: Path) -> None:
    record = json.loads((plain / "export.json").read_text())
    assert record["source"] == str(llama)
    assert len(record["source_sha256"]) == 64
    assert record["dtype"] == "fp32"
    assert record["kv_cache"] is False
    assert record["versions"]["torch"].startswith("2.")
    assert record["check"]["max_relative_error"] < 1e-4
    assert record["check"]["prompt"].startswith("The old lighthouse")


def test_cache_prefills_from_nothing_and_decodes(llama: Path, tmp_path: Path) -> None:
    export_model(llama, tmp_path / "kv", open_model=command.open_model, kv_cache=True)
    opened = session(tmp_path / "kv" / "model.onnx")
    inputs = {value.name: value.shape for value in opened.get_inputs()}
    assert inputs["past_key_values.1.value"] == ["batch", 2, "past_sequence", 16]
    ids = ids_of(2, 9)
    expected = logits_of_torch(llama, ids)
    found = _in_pieces(opened, ids, ((0, 4), (4, 5), (5, 9)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _in_pieces(opened: Any, ids: np.ndarray, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
    """Logits of one run for each piece of ids (batch, …), which takes the caches of the run before."""
    inputs = [value for value in opened.get_inputs() if value.name.startswith("past")]
    past = {value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32) for value in inputs}
    found = []
    for start, stop in pieces:
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((len(ids), stop), np.int64)}
        positions = np.tile(np.arange(start, stop), (len(ids), 1))
        logits, *present = opened.run(None, feeds | {"position_ids": positions} | past)
        past = dict(zip(past, present, strict=True))
        found.append(logits)
    return np.concatenate(found, axis=1)


def test_the_head_of_a_decoder_for_genai_scores_the_last_row(llama: Path, last: Path) -> None:
    record = json.loads((last / "export.json").read_text())
    assert (record["kv_cache"], record["logits"]) == (True, "last")
    opened = session(last / "model.onnx")
    assert opened.get_outputs()[0].shape == ["batch", 1, 256]
    ids = ids_of(2, 9)
    expected = logits_of_torch(llama, ids)[:, [3, 4, 8]]
    found = _in_pieces(opened, ids, ((0, 4), (4, 5), (5, 9)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_last_row_is_the_last_one_that_is_no_padding(llama: Path, last: Path) -> None:
    """Padded on the left as transformers does, on the right as onnxruntime-genai; then a token behind both."""
    opened = session(last / "model.onnx")
    ids, empty = ids_of(3, 7), np.zeros((3, 2, 0, 16), np.float32)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7], np.int64)
    past = {value.name: empty for value in opened.get_inputs()[3:]}
    texts = [[int(own) for own in row[seen == 1]] for row, seen in zip(ids, mask, strict=True)]
    for _ in range(2):
        rows = ids.shape[1]
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -rows:]
        found, *present = opened.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past)
        for own, text in zip(found, texts, strict=True):
            expected = logits_of_torch(llama, np.array([text]))[0, -1]
            np.testing.assert_allclose(own[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        past, ids, mask = (
            dict(zip(past, present, strict=True)),
            ids_of(3, 1),
            np.pad(mask, ((0, 0), (0, 1)), constant_values=1),
        )
        texts = [[*text, int(own[0])] for text, own in zip(texts, ids, strict=True)]


def test_command_exports_fp16_and_says_what_to_type_next(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "half"
    assert main(["export", str(llama), "-o", str(target), "--dtype", "fp16", "--layers", "1"]) == 0
    said = capsys.readouterr().out
    assert "agrees with torch" in said
    assert "--passes smooth,awq,pack" in said
    assert "torch.onnx" not in said
    model = ir.load(target / "model.onnx")
    linears = find_linears(model.graph)
    assert len(linears) == 8, "one layer and the lm_head"
    assert {linear.weight.dtype for linear in linears} == {ir.DataType.FLOAT16}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 1


def test_licences_of_a_model_come_along(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in a folder of Hugging Face, and beside a file of the zoo; of a file that lies anywhere nothing does."""
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    (folder / "LICENSE.txt").write_text("as is")
    (folder / "notes.txt").write_text("mine")
    export_model(folder, tmp_path / "out", open_model=command.open_model)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "as is"
    assert not (tmp_path / "out" / "notes.txt").exists()
    kept = tmp_path / "cache"
    kept.mkdir()
    for name in ("NOTICE.md", "GEMMA_TERMS.html", "shopping_terms.txt"):
        (kept / name).write_text(name)
    shutil.copyfile(tmp_path / "out" / "model.onnx", kept / "own.onnx")
    monkeypatch.setattr(zoo, "fetch", lambda name: kept / "own.onnx")
    export_model("rapidocr-cls", tmp_path / "zoo", open_model=command.open_model)
    names = {path.name for path in (tmp_path / "zoo").iterdir()}
    assert names == {"model.onnx", "export.json", "NOTICE.md", "GEMMA_TERMS.html"}


def test_encoder_and_an_overwritten_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=256, max_position_embeddings=80, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    target = tmp_path / "out"
    target.mkdir()
    (target / "export.json").write_text("{}")
    (target / "model.onnx").write_text("an earlier one")
    (target / "compiled.onnx").write_text("mine")
    export_model(tmp_path / "bert", target, open_model=command.open_model)
    model = ir.load(target / "model.onnx")
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in model.graph.outputs] == ["last_hidden_state", "pooler_output"]
    assert len(find_linears(model.graph)) + sum(node.op_type == "Gemm" for node in model.graph) == 7
    assert (target / "compiled.onnx").read_text() == "mine"
    assert "random ids" in json.loads((target / "export.json").read_text())["check"]["prompt"]
    with pytest.raises(UserError, match="is an encoder"):
        export_model(tmp_path / "bert", target, open_model=command.open_model, kv_cache=True)


def test_disagreement_is_an_error_and_nothing_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "to_onnx", lambda *_: tiny_decoder())
    with pytest.raises(UserError, match=r"disagrees with torch: relative error \S+ at prompt:logits"):
        export_model(llama, tmp_path / "new", open_model=command.open_model)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", [False, True])
def test_the_zoo_decoder(tmp_path: Path, kv_cache: bool) -> None:
    """SmolLM2-135M out of its GGUF file, whole."""
    done = export_model("smollm2-135m", tmp_path / "smol", open_model=command.open_model, kv_cache=kv_cache)
    assert done.size < 545e6
    assert len(find_linears(ir.load(done.path).graph)) == 211
    assert done.record["check"]["max_relative_error"] < 1e-3


@pytest.mark.slow
def test_the_zoo_encoder(tmp_path: Path) -> None:
    """MiniLM-L6 as it was published."""
    done = export_model("minilm-l6", tmp_path / "minilm", open_model=command.open_model)
    assert done.record["check"]["max_relative_error"] < 1e-3
