"""Models of transformers as `qcompile export` writes them: their attention is found, and kept exact."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architectures_zoo import ARCHITECTURES, Architecture
from fusing import check_same, fuse_attention, nodes_of

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.commands.export import open_model
from qcompile.models.export import export_model
from qcompile.runtime.sessions import session

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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*_FAMILIES, *_KEPT])
def test_every_family_compiles(name: str, tmp_path: Path) -> None:
    """With joined products, gates and caches in codes, each pass held to what it promises, and every cache coded."""
    _exported(_FAMILIES[name] if name in _FAMILIES else _KEPT[name][0], tmp_path)
    for passes in ("pack", "smooth,awq,pack,kv", "smooth,qdq,kv"):
        recipe = Recipe(passes=parse_passes(passes), samples=8, context=32, group_size=32, min_cosine=0)
        report = compile_model(tmp_path / "onnx" / "model.onnx", recipe, output=tmp_path / "model.onnx")
        coded = [decision for decision in report.decisions.get("kv", ()) if decision.action == "coded"]
        assert bool(coded) == passes.endswith("kv")
        assert report.caches.startswith("4 of 4 in codes" if coded else "")


# Of each graph, how many inputs its attentions have: 3 without a mask, or with one that hides nothing, 6 with one.
_UNCACHED: dict[str, dict[str, int]] = {
    "t5": {"encoder.onnx": 6, "decoder.onnx": 6},
    "clip": {"text_model.onnx": 6, "vision_model.onnx": 3},
    "modernbert": {"model.onnx": 6},
    "swin": {"model.onnx": 6},
    "dinov2": {"model.onnx": 3},
}


def _feeds(own: Any) -> dict[str, Any]:
    """Two texts, the first one padded, or pictures."""
    random, feeds = np.random.default_rng(0), {}
    for value in own.get_inputs():
        shape = [size if isinstance(size, int) else 2 if size == "batch" else 7 for size in value.shape]
        array = random.standard_normal(shape).astype(np.float32)
        if "int" in value.type:
            array = np.ones(shape, np.int64) if "mask" in value.name else random.integers(3, 50, shape)
            array[0, -2:] = 0 if "mask" in value.name else array[0, -2:]
        feeds[value.name] = array
    return feeds


@pytest.mark.slow
@pytest.mark.parametrize("name", _UNCACHED)
def test_attention_without_caches_is_fused(name: str, tmp_path: Path) -> None:
    """Relative positions, causal masks, windows, encoders' states, padding: all numbers are the same."""
    ARCHITECTURES[name].make().save_pretrained(str(tmp_path / "checkpoint"))
    export_model(tmp_path / "checkpoint", tmp_path / "onnx", open_model=open_model)
    for file, inputs in _UNCACHED[name].items():
        model = ir.external_data.load_to_model(ir.load(tmp_path / "onnx" / file))
        made, decisions = fuse_attention(model)
        assert {decision.reason for decision in decisions} == {"MultiHeadAttention"}
        assert {len(node.inputs) for node in nodes_of(made, "MultiHeadAttention")} == {inputs}
        before, after = (session(ir.to_proto(own).SerializeToString()) for own in (model, made))
        feeds = _feeds(before)
        for expected, found in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
