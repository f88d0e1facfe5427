"""GGUF files: a small one written here, read by transformers, kept in the cache as an ordinary folder."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from qcompile.models import hf, kinds

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 128, 4, 2, 2


def write_gguf(path: Path) -> np.ndarray:
    """A Llama-shaped file with a byte-level tokenizer; returns its embedding (259, HIDDEN)."""
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
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", rng.standard_normal(shape, np.float32))
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
