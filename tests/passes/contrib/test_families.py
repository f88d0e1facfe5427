"""Decoders of transformers as `qcompile export --kv-cache` writes them: their attention is found, and kept exact."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architectures_zoo import ARCHITECTURES, Architecture
from fusing import check_same, fuse_attention, nodes_of

from qcompile.compiler.commands.export import open_model
from qcompile.models.export import export_model

_TEXT: dict[str, Any] = ARCHITECTURES["gpt-neox"].settings
_LLM: dict[str, Any] = ARCHITECTURES["llama"].settings
_WHOLE = {key: value for key, value in _LLM.items() if key != "head_dim"}
# Turned by interleaved pairs, in part, with windows, by one head of keys, with norms of heads or behind their branch.
_FAMILIES = {
    **{name: ARCHITECTURES[name] for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt")},
    **{name: ARCHITECTURES[name] for name in ("falcon", "mixtral", "qwen3-moe")},
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", _LLM | {"sliding_window": 8}),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT | {"num_attention_heads": 2, "rotary_pct": 0.5}
    ),
    "gptj": Architecture(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "n_positions": 128},
    ),
    "cohere": Architecture("CohereForCausalLM", "CohereConfig", _LLM),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", _WHOLE),
    "smollm3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config", _WHOLE),
    "granite": Architecture("GraniteForCausalLM", "GraniteConfig", _WHOLE),
}
# What GroupQueryAttention cannot do, with what is said of it.
_KEPT = {
    "bloom": (ARCHITECTURES["bloom"], "no product reads its probabilities"),
    "glm": (
        Architecture("GlmForCausalLM", "GlmConfig", _LLM | {"partial_rotary_factor": 0.5}),
        "GroupQueryAttention takes heads and halves of rotations in multiples of 8, not 16 and 4",
    ),
}


def _exported(own: Architecture, folder: Path) -> ir.Model:
    own.make().save_pretrained(str(folder / "checkpoint"))
    done = export_model(folder / "checkpoint", folder / "onnx", open_model=open_model, kv_cache=True)
    return ir.external_data.load_to_model(ir.load(done.path))


@pytest.mark.slow
@pytest.mark.parametrize("name", _FAMILIES)
def test_attention_of_a_family_is_fused(name: str, tmp_path: Path) -> None:
    model = _exported(_FAMILIES[name], tmp_path)
    made, decisions = fuse_attention(model)
    assert len(nodes_of(made, "GroupQueryAttention")) == 2
    assert {decision.action for decision in decisions} == {"fused"}
    left, right = np.ones((2, 9), np.int64), np.ones((2, 9), np.int64)
    left[0, :3], right[0, -2:] = 0, 0
    for mask, rows in ((left, [1, 1]), (right, [1, 1]), (np.ones((1, 9), np.int64), [4, 1])):
        check_same(model, made, mask, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", _KEPT)
def test_what_cannot_be_fused_says_so(name: str, tmp_path: Path) -> None:
    own, reason = _KEPT[name]
    model = _exported(own, tmp_path)
    made, decisions = fuse_attention(model)
    assert not nodes_of(made, "GroupQueryAttention")
    assert [decision.reason for decision in decisions if decision.action == "kept"] == [reason] * 2
    check_same(model, made, np.ones((2, 9), np.int64), [1])
