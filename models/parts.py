"""A model as the graphs that it is exported to: what each takes, what it gives, real inputs to try it with."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.models import kinds
from qcompile.models.trace import Arrays, Dims, Signature
from qcompile.passes.errors import UserError

# Outputs of transformers' models that no graph gives: what the loss is made of, what debugging wants.
_LEFT_OUT = {"loss", "hidden_states", "attentions", "past_key_values", "cross_attentions"}
_PAST = "past_key_values"
# Sizes to trace with, which no other dimension has by rule, and others to check with.
TRACED = {"batch": 2, "sequence": 7, "encoder_sequence": 11, "past_sequence": 5, "samples": 4000}
CHECKED = {"batch": 3, "sequence": 6, "encoder_sequence": 9, "past_sequence": 4, "samples": 6000}


@dataclass(frozen=True)
class Part:
    """One graph. feeds: arrays for it by sizes (batch, sequence, …); module: takes a list in the signature's order."""

    name: str
    module: Any
    signature: Signature
    feeds: Callable[[Mapping[str, int]], Arrays]


@dataclass(frozen=True)
class Given:
    """An input of a part: its dimensions (names where they vary), and what draws an array of a shape."""

    dims: tuple[int | str, ...]
    draw: Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[Any]]

    @property
    def symbols(self) -> Dims:
        """The names of the dimensions that vary, None for the fixed ones."""
        return tuple(dim if isinstance(dim, str) else None for dim in self.dims)


Run = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


@dataclass
class Builder:
    """Makes the parts of one model; each is run once, to learn the names and ranks of its outputs."""

    model: Any
    folder: Path
    dtype: npt.DTypeLike = np.float32
    made: list[Part] = field(default_factory=list)

    def add(self, name: str, given: Mapping[str, Given], run: Run, *, cache_layers: int = 0, a_layer: int = 2) -> Part:
        """A part whose module calls `run` with the model and its inputs by name."""

        def feeds(sizes: Mapping[str, int]) -> Arrays:
            random = np.random.default_rng(0)
            return {
                key: own.draw(random, tuple(dim if isinstance(dim, int) else sizes[dim] for dim in own.dims))
                for key, own in given.items()
            }

        module = _module(self.model, list(given), run)
        outputs = _outputs(module, feeds(TRACED), f"{self.model.config.model_type}: its {name}")
        inputs = {key: own.symbols for key, own in given.items()}
        part = Part(name, module, Signature(inputs, outputs, cache_layers, a_layer, listed_all=True), feeds)
        self.made.append(part)
        return part

    def floats(self, *dims: int | str) -> Given:
        """Normal numbers."""
        return Given(dims, lambda random, shape: random.standard_normal(shape).astype(self.dtype))


def parts_of(model: Any, kind: str, folder: Path, *, kv_cache: bool, dtype: str) -> list[Part]:
    """The parts of a model of a kind other than text alone (kinds.DECODER and ENCODER, which `trace` knows)."""
    if kv_cache and kind != kinds.SEQ2SEQ:
        raise UserError(f"{model.config.model_type} is no decoder: it has no KV cache")
    build = Builder(model, folder, np.float16 if dtype == "fp16" else np.float32)
    {kinds.VISION: _vision, kinds.SPEECH: _speech, kinds.DUAL: _dual}.get(kind, _seq2seq_with(kv_cache))(build)
    return build.made


def ids(vocabulary: int, *dims: str) -> Given:
    """Token ids."""
    return Given(dims, lambda random, shape: random.integers(3, vocabulary, shape))


def mask(*dims: str) -> Given:
    """Ones, the last two tokens of the last row being padding."""

    def draw(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        made = np.ones(shape, np.int64)
        made[-1, -2:] = 0
        return made

    return Given(dims, draw)


def _vision(build: Builder) -> None:
    pixels = _pixels(build, build.model.config)
    build.add("model", {"pixel_values": pixels}, lambda model, given: tensors(model(**given)))


def _pixels(build: Builder, config: Any) -> Given:
    """Images (batch, channels, height, width) of the size that the configuration names, or the processor's, or 224."""
    size = getattr(config, "image_size", None) or _processed(build.folder) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return build.floats("batch", int(getattr(config, "num_channels", 3)), int(height), int(width))


def _processed(folder: Path) -> tuple[int, int] | None:
    try:
        told = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = told.get("crop_size") or told.get("size")
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        return (int(edge), int(edge)) if edge else (int(size["height"]), int(size["width"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _speech(build: Builder) -> None:
    name = build.model.main_input_name
    build.add("model", {name: _audio(build, name)}, lambda model, given: tensors(model(**given)))


def _audio(build: Builder, name: str) -> Given:
    """Samples (batch, samples), or features of the shape that the configuration names."""
    config = build.model.config
    bins = getattr(config, "num_mel_bins", None)
    if name == "input_values" and bins and getattr(config, "max_length", None):  # a spectrogram as an image
        return build.floats("batch", int(config.max_length), int(bins))
    if name == "input_values":
        return build.floats("batch", "samples")
    if bins and hasattr(config, "max_source_positions"):
        return build.floats("batch", int(bins), 2 * int(config.max_source_positions))
    width = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", None)
    if width is None:
        raise UserError(f"{config.model_type}: the width of its {name} is unknown, so it cannot be exported")
    return build.floats("batch", "sequence", int(width))


def _dual(build: Builder) -> None:
    config = build.model.config
    text = {
        "input_ids": ids(int(config.text_config.vocab_size), "batch", "sequence"),
        "attention_mask": mask("batch", "sequence"),
    }
    build.add("text_model", text, lambda model, given: {"text_embeds": _embeds(model.get_text_features(**given))})
    pixels = {"pixel_values": _pixels(build, config.vision_config)}
    build.add("vision_model", pixels, lambda model, given: {"image_embeds": _embeds(model.get_image_features(**given))})


def _embeds(out: Any) -> Any:
    """The embedding itself: transformers gives it alone, or as what is pooled."""
    return out if not hasattr(out, "pooler_output") else out.pooler_output


def _seq2seq_with(kv_cache: bool) -> Callable[[Builder], None]:
    def build_all(build: Builder) -> None:
        _encoder(build)
        _decoder(build, kv_cache=kv_cache)

    return build_all


def _encoder(build: Builder) -> None:
    speech = build.model.main_input_name == "input_features"
    if speech:
        given = {"input_features": _audio(build, "input_features")}
    else:
        given = {
            "input_ids": ids(int(build.model.config.vocab_size), "batch", "sequence"),
            "attention_mask": mask("batch", "sequence"),
        }
    build.add("encoder", given, lambda model, own: tensors(model.get_encoder()(**own)))


def _decoder(build: Builder, *, kv_cache: bool) -> None:
    """decoder: all tokens so far, to logits (with a cache also to it); decoder_with_past: one more token."""
    config = build.model.config
    speech = build.model.main_input_name == "input_features"
    states: int | str = int(config.max_source_positions) if speech else "encoder_sequence"
    width = int(getattr(config, "d_model", 0) or config.hidden_size)
    given = {"input_ids": ids(int(config.vocab_size), "batch", "sequence")}
    if not speech:
        given["encoder_attention_mask"] = mask("batch", "encoder_sequence")
    first = given | {"encoder_hidden_states": build.floats("batch", states, width)}
    build.add("decoder", first, lambda model, own: _decoded(model, own, kv_cache=kv_cache))
    if kv_cache:
        past = _past(build, states)
        build.add("decoder_with_past", given | past, _continued, cache_layers=len(past) // 4, a_layer=4)


def _decoded(model: Any, given: Mapping[str, Any], *, kv_cache: bool) -> dict[str, Any]:
    out = _run_decoder(model, given, given["encoder_hidden_states"], None, kv_cache=kv_cache)
    return {"logits": out.logits} | (dict(_present(out.past_key_values)) if kv_cache else {})


def _continued(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """One step behind a past; the encoder's states are in its cache, so that only their shape is needed."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    layers = sum(name.endswith(".decoder.key") for name in given)
    own, cross = (
        DynamicCache([tuple(given[f"{_PAST}.{i}.{side}.{kind}"] for kind in ("key", "value")) for i in range(layers)])
        for side in ("decoder", "encoder")
    )
    key = given[f"{_PAST}.0.encoder.key"]
    width = int(getattr(model.config, "d_model", 0) or model.config.hidden_size)
    states = torch.zeros((key.shape[0], key.shape[2], width), dtype=key.dtype)
    out = _run_decoder(model, given, states, EncoderDecoderCache(own, cross), kv_cache=True)
    return {"logits": out.logits} | {name: t for name, t in _present(out.past_key_values) if ".decoder." in name}


def _run_decoder(model: Any, given: Mapping[str, Any], states: Any, past: Any, *, kv_cache: bool) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    masked = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=given["input_ids"],
        past_key_values=past,
        use_cache=kv_cache,
        **masked,
    )


def _present(cache: Any) -> Iterator[tuple[str, Any]]:
    """Caches by name, as optimum names them."""
    for i, layer in enumerate(cache.self_attention_cache.layers):
        yield from ((f"present.{i}.decoder.key", layer.keys), (f"present.{i}.decoder.value", layer.values))
    for i, layer in enumerate(cache.cross_attention_cache.layers):
        yield from ((f"present.{i}.encoder.key", layer.keys), (f"present.{i}.encoder.value", layer.values))


def _past(build: Builder, states: int | str) -> dict[str, Given]:
    """The inputs that continue the decoder's caches, in the order of its outputs."""
    decoder = build.made[-1]
    found = {}
    with_shapes = _run(decoder.module, decoder.feeds(TRACED))
    for name, array in zip(decoder.signature.outputs, with_shapes, strict=True):
        if name.startswith("present."):
            length = "past_sequence" if ".decoder." in name else states
            own = build.floats("batch", int(array.shape[1]), length, int(array.shape[3]))
            found[name.replace("present", _PAST, 1)] = own
    return found


def tensors(out: Any) -> dict[str, Any]:
    """The float tensors that a model's output holds by name."""
    import torch

    return {
        name: value
        for name, value in out.items()
        if torch.is_tensor(value) and value.is_floating_point() and name not in _LEFT_OUT
    }


def _module(model: Any, names: list[str], run: Run) -> Any:
    import torch

    class Part(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, inputs: Any) -> Any:
            return tuple(run(self.m, dict(zip(names, inputs, strict=True))).values())

    made = Part().eval()
    made.outputs = lambda inputs: list(run(model, dict(zip(names, inputs, strict=True))))
    return made


def _run(module: Any, feeds: Arrays) -> tuple[Any, ...]:
    import torch

    with torch.no_grad():
        return tuple(module([torch.from_numpy(array) for array in feeds.values()]))


def _outputs(module: Any, feeds: Arrays, label: str) -> dict[str, Dims]:
    """Names of the outputs, and their dimensions: the batch, and what the exporter knows."""
    import torch

    try:
        with torch.no_grad():
            given = [torch.from_numpy(array) for array in feeds.values()]
            names, found = module.outputs(given), module(given)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise UserError(f"{label} cannot be run on {shapes}: {lines[0][:200]}") from error
    if not names:
        raise UserError(f"{label} gives no float tensor: it cannot be exported")
    return {name: ("batch", *(None,) * (tensor.ndim - 1)) for name, tensor in zip(names, found, strict=True)}
