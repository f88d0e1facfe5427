"""GGUF files: a small one written here, read by transformers, kept in the cache as an ordinary folder."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import blocks
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from qcompile.compiler.api.folders import open_model
from qcompile.compiler.api.kept import Keeper
from qcompile.compiler.cli import main
from qcompile.models import hf, kinds, zoo
from qcompile.models.export import export_model
from qcompile.passes.errors import UserError

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 128, 4, 2, 2


def write_gguf(path: Path, kinds: Mapping[str, str] = {}) -> np.ndarray:
    """A Llama-shaped file with a byte-level tokenizer; returns its embedding (259, HIDDEN). kinds: types by name."""
    rng, tokens = np.random.default_rng(0), [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<s>", "</s>"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    narrow = HIDDEN * KV_HEADS // HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (narrow, HIDDEN), "attn_v": (narrow, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, FFN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    embedding = rng.standard_normal((len(tokens), HIDDEN), np.float32)
    shapes = {"token_embd": embedding.shape, **shapes}
    raws = {name: blocks(kind, *shapes[name], spread=1) for name, kind in kinds.items()}
    types = {name: gguf.GGMLQuantizationType[kind] for name, kind in kinds.items()}
    shapes.pop("token_embd")
    writer.add_tensor("token_embd.weight", raws.get("token_embd", embedding), raw_dtype=types.get("token_embd"))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            own = raws.get(name, rng.standard_normal(shape, np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight", own, raw_dtype=types.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


def test_a_gguf_file_becomes_a_cached_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    embedding = write_gguf(tmp_path / "tiny.gguf")
    opened = hf.open_gguf(tmp_path / "tiny.gguf", "tiny.gguf")
    weights = load_file(opened.folder / "model.safetensors")
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], embedding)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    assert Tokenizer.from_file(str(opened.folder / "tokenizer.json")).encode("the").tokens == ["th", "e"]
    config = hf.load_config(opened)
    assert (kinds.kind_of(config), config.num_hidden_layers, config.num_key_value_heads) == (
        "decoder",
        LAYERS,
        KV_HEADS,
    )
    monkeypatch.setattr(hf, "_convert", lambda *_: pytest.fail("the second one comes from the cache"))
    assert hf.open_gguf(tmp_path / "tiny.gguf", "tiny.gguf") == opened


def test_its_quantized_tensors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """All of them, in the command: queries and keys, whose rows transformers reorders, and a table tied to the head."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    given = {"token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1"}
    given |= {"ffn_gate": "IQ4_NL", "ffn_up": "MXFP4"}
    write_gguf(tmp_path / "tiny.gguf", given)
    command = ["export", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "out"), "--keep-quantized", "--no-kv-cache"]
    assert main(command) == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["check"]["max_relative_error"] < 1e-4
    told = {own["weight"]: (own["type"], own["reason"]) for own in record["kept"]["weights"]}
    names = {"embed_tokens": "Q8_0"}
    for layer in range(LAYERS):
        parts = {"q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q5_0", "o_proj": "Q5_1"}
        names |= {f"layers.{layer}.self_attn.{part}": kind for part, kind in parts.items()}
        names |= {f"layers.{layer}.mlp.gate_proj": "IQ4_NL", f"layers.{layer}.mlp.up_proj": "MXFP4"}
    down = {f"model.layers.{layer}.mlp.down_proj.weight": ("", "the file has it in F32") for layer in range(LAYERS)}
    assert told == {f"model.{name}.weight": (kind, "") for name, kind in names.items()} | down
    said = " ".join("".join(capsys.readouterr()).split())
    assert "left in float: model.layers.0.mlp.down_proj.weight and 1 more: the file has it in F32" in said
    assert "IQ4_NL" in said
    assert "times the size of the GGUF file" in said
    assert main([str(tmp_path / "out"), "--passes", "fuse", "-o", str(tmp_path / "fused")]) == 0  # as a compiled model
    feeds = {"input_ids": np.arange(24).reshape(2, 12), "attention_mask": np.ones((2, 12), np.int64)}
    kept, fused = (open_model(tmp_path / name / "model.onnx")(feeds)["logits"] for name in ("out", "fused"))
    np.testing.assert_allclose(fused, kept, rtol=0, atol=1e-5 * np.abs(kept).max())


def test_keeping_is_for_gguf_files_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    keep = {"open_model": pytest.fail, "keep": pytest.fail}
    with pytest.raises(UserError, match="is no GGUF file: --keep-quantized keeps the quantized tensors of one"):
        export_model(tmp_path / "folder", tmp_path / "out", **keep)
    with pytest.raises(UserError, match="--keep-quantized gives float32 graphs: in float16 the file's numbers"):
        export_model(tmp_path / "folder", tmp_path / "out", **keep, dtype="fp16")


@pytest.mark.slow
def test_two_layers_of_the_zoo_model_are_kept_whole(tmp_path: Path) -> None:
    """Blocks that llama.cpp made: Q4_1 with minima, a Q8_0 table that is the head, too; its order of queries."""
    done = export_model("smollm2-135m", tmp_path, open_model=open_model, keep=Keeper, max_layers=2)
    weights = done.record["kept"]["weights"]
    assert Counter(own["type"] for own in weights) == {"Q4_1": 14, "Q8_0": 1}
    assert {own["form"] for own in weights} == {"int4 g32 sym, offsets", "int8 g32 asym"}
    assert done.record["check"]["max_relative_error"] < 1e-4
    reader = gguf.GGUFReader(zoo.fetch("smollm2-135m"))
    used = [t for t in reader.tensors if t.name.startswith(("token_embd", "blk.0.", "blk.1."))]
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.03 * sum(int(t.n_bytes) for t in used)
