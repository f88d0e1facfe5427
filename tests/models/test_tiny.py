"""The seeded graphs: valid, runnable, reproducible, and shaped like what they stand for."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from opened import opened
from tokenizers import Tokenizer

from qcompile.models.tiny import tiny_branch, tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp, tiny_tokenizer
from qcompile.passes.linears import find_embeddings, find_linears

IDS = np.random.default_rng(0).integers(0, 256, (2, 12))
MASK = np.ones((2, 12), np.int64)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = opened(model)
    return session.run(None, feeds)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": False, "kv_heads": 4},
        {"norm": "layer"},
        {"norm": "simplified"},
        {"norm": "skip"},
        {"norm": "rmsnorm", "opset": 23},
        {"dtype": "fp16"},
        {"opset": 18, "layers": 1, "outliers": False},
    ],
    ids=str,
)
def test_decoder_runs_and_predicts_something(options: dict) -> None:
    logits = run(tiny_decoder(**options), {"input_ids": IDS, "attention_mask": MASK})[0].astype(np.float32)
    assert logits.shape == (2, 12, 256)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = float(-(p * np.log(p + 1e-30)).sum(-1).mean())
    assert 0.3 < entropy < 5.0, "neither one-hot nor uniform (ln 256 = 5.5)"


def test_norms_written_differently_compute_the_same() -> None:
    feeds = {"input_ids": IDS, "attention_mask": MASK}
    reference = run(tiny_decoder(), feeds)[0]
    for norm, opset in (("simplified", 21), ("skip", 21), ("rmsnorm", 23)):
        np.testing.assert_allclose(run(tiny_decoder(norm=norm, opset=opset), feeds)[0], reference, rtol=0, atol=2e-4)


def test_decoder_structure() -> None:
    model = tiny_decoder(layers=3)
    linears = find_linears(model.graph)
    assert len(linears) == 3 * 7 + 1
    (embedding,) = find_embeddings(model.graph)
    assert linears[-1].transposed
    assert linears[-1].weight is embedding.table, "tied"
    assert all(value.shape is not None for node in model.graph for value in node.outputs)
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "sequence"]


def test_decoder_ignores_padding_and_the_future() -> None:
    model = tiny_decoder()
    logits = run(model, {"input_ids": IDS, "attention_mask": MASK})[0]
    changed = IDS.copy()
    changed[:, 8:] = 3
    shorter = run(model, {"input_ids": changed, "attention_mask": MASK})[0]
    np.testing.assert_allclose(shorter[:, :8], logits[:, :8], atol=1e-4)
    assert not np.allclose(shorter[:, 8:], logits[:, 8:], atol=1e-2)


def test_cache_reproduces_the_whole_sequence() -> None:
    whole = run(tiny_decoder(), {"input_ids": IDS, "attention_mask": MASK})[0]
    model = tiny_decoder(kv_cache=True)
    names = [value.name for value in model.graph.inputs][3:]
    assert names[:2] == ["past_key_values.0.key", "past_key_values.0.value"]

    def step(start: int, stop: int, past: list[np.ndarray]) -> list[np.ndarray]:
        positions = np.tile(np.arange(start, stop), (2, 1))
        feeds = {"input_ids": IDS[:, start:stop], "attention_mask": MASK[:, :stop], "position_ids": positions}
        return run(model, feeds | dict(zip(names, past, strict=True)))

    prefill = step(0, 8, [np.zeros((2, 2, 0, 16), np.float32)] * 4)
    decode = step(8, 12, prefill[1:])
    np.testing.assert_allclose(prefill[0], whole[:, :8], atol=1e-4)
    np.testing.assert_allclose(decode[0], whole[:, 8:], atol=1e-4)


def test_same_seed_same_bytes() -> None:
    first, second, other = (ir.to_proto(tiny_decoder(seed=s)).SerializeToString() for s in (5, 5, 6))
    assert first == second != other


def test_encoder_mlp_conv_and_branch_run() -> None:
    rng = np.random.default_rng(1)
    ids = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": MASK * 0}
    assert run(tiny_encoder(), ids)[0].shape == (2, 12, 48)
    for opset in (13, 21):
        assert run(tiny_mlp(opset=opset), {"x": rng.standard_normal((3, 48), np.float32)})[0].shape == (3, 10)
    assert run(tiny_conv(), {"image": rng.standard_normal((2, 3, 8, 8), np.float32)})[0].shape == (2, 7)
    x = rng.standard_normal((3, 32), np.float32)
    yes, no = (run(tiny_branch(), {"x": x, "flag": np.array(flag)})[0] for flag in (True, False))
    assert not np.allclose(yes, no)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_graphs_are_valid(dtype: str) -> None:
    for model in (tiny_decoder(dtype=dtype), tiny_encoder(dtype=dtype), tiny_mlp(dtype=dtype)):
        onnx.checker.check_model(ir.to_proto(model))


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="norm must be one of"):
        tiny_decoder(norm="batch")
    with pytest.raises(ValueError, match="opset 21 is too old"):
        tiny_decoder(norm="rmsnorm")
    with pytest.raises(ValueError, match="dtype must be one of"):
        tiny_mlp(dtype="fp8")


@pytest.mark.parametrize("size", [100, 256, 300])
def test_tokenizer_has_the_size_asked_for(size: int, tmp_path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer(size, tmp_path)))
    assert tokenizer.get_vocab_size() == size
    ids = tokenizer.encode("A plain sentence\nof words").ids
    assert max(ids) < size
    assert tokenizer.decode(ids) == "A plain sentence\nof words"
