"""Export of vision, speech, two-tower, encoder-decoder and MoE models: the parts, run as applications run them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazily import torch, transformers

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.commands import export as command
from qcompile.models import experts, hf, kinds, publish
from qcompile.models.export import Exported, export_model
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = TOWER | {"vocab_size": 256, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}


def _exported(model: Any, folder: Path, **options: Any) -> Exported:
    """The model, with weights that make its layers matter, saved to `in` and exported to `out`."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(folder / "in")
    return export_model(folder / "in", folder / "out", open_model=command.open_model, **options)


def _sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)))


def test_an_image_classifier_is_exported_and_compiled(tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, image_size=32, patch_size=8))
    done = _exported(model, tmp_path)
    assert (done.record["kind"], list(done.record["graphs"])) == ("vision", ["model.onnx"])
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)).logits.numpy()
    opened = session(done.path)
    assert [(value.name, value.shape) for value in opened.get_inputs()] == [("pixel_values", ["batch", 3, 32, 32])]
    np.testing.assert_allclose(opened.run(["logits"], {"pixel_values": pixels})[0], wanted, atol=1e-4)
    np.save(tmp_path / "images.npy", np.random.default_rng(1).standard_normal((16, 3, 32, 32)).astype(np.float32))
    for passes, least in (("pack", 12), ("smooth,qdq", 20)):
        recipe = Recipe(passes=parse_passes(passes), group_size=32, min_coverage=0)
        compile_model(done.path, recipe, output=tmp_path / "q.onnx", calibration=[str(tmp_path / "images.npy")])
        assert _sqnr(wanted, session(tmp_path / "q.onnx").run(["logits"], {"pixel_values": pixels})[0]) > least


@pytest.mark.slow
def test_speech_takes_samples_of_any_length(tmp_path: Path) -> None:
    layers = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 8), "vocab_size": 32}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**TOWER, **layers, **positions))
    done = _exported(model, tmp_path)
    samples = np.random.default_rng(0).standard_normal((1, 2000)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(samples)).logits.numpy()
    found = session(done.path).run(["logits"], {"input_values": samples})[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_two_towers_are_two_graphs(tmp_path: Path) -> None:
    text = TOWER | {"vocab_size": 256, "max_position_embeddings": 32, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8}, projection_dim=48
    )
    done = _exported(transformers.CLIPModel(config), tmp_path)
    assert list(done.record["graphs"]) == ["text_model.onnx", "vision_model.onnx"]
    ids = np.array([[5, 6, 2, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    assert session(tmp_path / "out" / "text_model.onnx").run(None, feeds)[0].shape == (1, 48)
    pixels = {"pixel_values": np.zeros((1, 3, 32, 32), np.float32)}
    assert session(tmp_path / "out" / "vision_model.onnx").run(["image_embeds"], pixels)[0].shape == (1, 48)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    _exported(model, folder, kv_cache=True)
    return model, folder / "out"


def test_an_encoder_and_its_decoder_generate_step_by_step(t5: tuple[Any, Path]) -> None:
    model, folder = t5
    encoder, decoder, further = (session(folder / f"{n}.onnx") for n in ("encoder", "decoder", "decoder_with_past"))
    random = np.random.default_rng(0)
    ids, mask = random.integers(3, 256, (2, 8)), np.ones((2, 8), np.int64)
    mask[1, 6:] = 0
    target = random.integers(3, 256, (2, 6))
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
        wanted = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
    (states,) = encoder.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
    names = [output.name for output in decoder.get_outputs()]
    first = {"input_ids": target[:, :2], "encoder_attention_mask": mask, "encoder_hidden_states": states}
    outputs = dict(zip(names, decoder.run(names, first), strict=True))
    np.testing.assert_allclose(outputs["logits"], wanted[:, :2], atol=1e-4)
    past = {name.replace("present", "past_key_values"): a for name, a in outputs.items() if name != "logits"}
    names = [output.name for output in further.get_outputs()]
    for step in range(2, 6):
        feeds = {"input_ids": target[:, step : step + 1], "encoder_attention_mask": mask, **past}
        outputs = dict(zip(names, further.run(names, feeds), strict=True))
        np.testing.assert_allclose(outputs["logits"][:, 0], wanted[:, step], atol=1e-4)
        past |= {name.replace("present", "past_key_values"): a for name, a in outputs.items() if name != "logits"}


def test_every_part_is_compiled(t5: tuple[Any, Path], tmp_path: Path) -> None:
    for name in ("encoder", "decoder", "decoder_with_past"):
        recipe = Recipe(passes=parse_passes("pack"), group_size=32)
        report = compile_model(t5[1] / f"{name}.onnx", recipe, output=tmp_path / f"{name}.onnx")
        assert report.coverage == 1
        assert min(output.cosine for output in report.outputs) > 0.9


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_static_experts_are_those_that_the_router_chose(family: str) -> None:
    sizes = {"num_local_experts": 4} | ({"num_experts": 4, "moe_intermediate_size": 96} if family == "Qwen3Moe" else {})
    config = getattr(transformers, f"{family}Config")(**MOE, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = model(ids).logits
        assert experts.make_static(model)
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_mixture_of_experts_is_exported(tmp_path: Path) -> None:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))
    done = _exported(model, tmp_path)
    assert done.record["kind"] == "decoder"
    ids = np.arange(10).reshape(1, 10)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    (found,) = session(done.path).run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_what_no_graph_is_made_of_is_told(tmp_path: Path) -> None:
    llava = transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(UserError, match="llava joins a text model with vision: such models cannot be exported whole"):
        kinds.kind_of(llava)
    config = transformers.ViTConfig(**TOWER, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="vit is no decoder: it has no KV cache"):
        export_model(tmp_path / "vit", tmp_path / "out", open_model=command.open_model, kv_cache=True)
    told = json.loads((tmp_path / "vit" / "config.json").read_text()) | {"image_size": 3}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="vit"):
        export_model(tmp_path / "vit", tmp_path / "out", open_model=command.open_model)
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_graphs_of_an_earlier_export_go_and_foreign_ones_stay(tmp_path: Path) -> None:
    def exported(*names: str) -> None:
        with publish.staging(tmp_path / "out", "x") as work:
            for name in names:
                (work / name).write_text("graph")
                (work / f"{name}.data").write_text("data")
            (work / "export.json").write_text(json.dumps({"graphs": dict.fromkeys(names, 0)}))
            publish.publish(work, tmp_path / "out")

    exported("encoder.onnx", "decoder.onnx")
    (tmp_path / "out" / "mine.onnx").write_text("mine")
    exported("model.onnx")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "export.json", "mine.onnx"}
    with pytest.raises(UserError, match=r"mine\.onnx exists and was not written by `qcompile export`"):
        exported("mine.onnx")
    assert (tmp_path / "out" / "mine.onnx").read_text() == "mine"


def test_text_kinds_are_what_they_were() -> None:
    for name, kind in (("Llama", "decoder"), ("Bert", "encoder"), ("GPT2", "decoder"), ("T5", "seq2seq")):
        assert kinds.kind_of(getattr(transformers, f"{name}Config")()) == kind
    assert hf.COMPANIONS[0] == "config.json"
