"""Hugging Face folders and GGUF files: what they hold, loading them offline, their tokenizer."""

import contextlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.models import cache, experts, kinds
from qcompile.models.licences import licence_files
from qcompile.passes.errors import UserError

# What a model needs beside its weights: ids of special tokens, the tokenizer, the chat template.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
# Older vocabularies, which transformers converts. Without one of them it would make up an empty tokenizer.
_VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers loads, and where it came from. sha256 is that of the weights as they were given.

    gguf: the file that the folder was made of, if any.
    """

    folder: Path
    source: str
    sha256: str
    gguf: Path | None = None


def require_export_extra() -> None:
    """Refuse to go on without torch and transformers."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs torch and transformers ({error}): install qcompile-onnx[export]") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch, transformers and tqdm print, warn and log; keep transformers off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


def open_folder(folder: Path, source: str) -> Checkpoint:
    """A Hugging Face folder, its weights hashed."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it, so it is no Hugging Face model folder")
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not weights:
        raise UserError(f"{folder}: no weights in it (*.safetensors or pytorch_model*.bin)")
    return Checkpoint(folder, source, cache.sha256(weights))


def open_gguf(path: Path, source: str) -> Checkpoint:
    """A GGUF file, dequantized once into a float32 Hugging Face folder in the cache."""
    require_export_extra()
    digest = cache.sha256([path])
    wanted = ("config.json", "tokenizer.json")
    folder = cache.entry(f"gguf/{path.stem}-{digest[:12]}", lambda work: _convert(path, work), complete=wanted)
    return Checkpoint(folder, source, digest, path)


def load_config(checkpoint: Checkpoint) -> Any:
    """The folder's transformers configuration."""
    from transformers import AutoConfig

    with _told(checkpoint), quiet():
        return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)


def load_model(checkpoint: Checkpoint, config: Any, *, kind: str, dtype: str) -> Any:
    """The torch module in evaluation mode, of type "fp32" or "fp16"; experts, if it has any, as a static graph."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    made = {kinds.DECODER: AutoModelForCausalLM, kinds.ENCODER: AutoModel}.get(kind) or kinds.model_class(config)
    float_type = torch.float16 if dtype == "fp16" else torch.float32
    with _told(checkpoint), quiet():
        model = made.from_pretrained(checkpoint.folder, config=config, dtype=float_type, local_files_only=True)
        model = model.eval().to(float_type)
        experts.make_static(model)
    return model


def cut_layers(config: Any, layers: int | None) -> None:
    """Keep only the first `layers` layers of what the configuration describes."""
    if layers is None:
        return
    present = getattr(config, "num_hidden_layers", None)
    if not isinstance(present, int) or not 1 <= layers <= present:
        raise UserError(f"the model has {present} layers: cannot keep {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def copy_companions(checkpoint: Checkpoint, config: Any, target: Path) -> None:
    """Tokenizer, configuration and licences into `target`; a tokenizer without tokenizer.json is converted."""
    named = (checkpoint.folder / name for name in COMPANIONS)
    for path in [*(path for path in named if path.is_file()), *licence_files(checkpoint.folder)]:
        shutil.copyfile(path, target / path.name)
    convertible = any((checkpoint.folder / name).is_file() for name in _VOCABULARIES)
    if convertible and not (target / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        # A model without a tokenizer is legal.
        with quiet(), contextlib.suppress(Exception):
            AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True).save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")


def _convert(path: Path, work: Path) -> None:
    """GGUF to a float32 folder. The loaded model counts as quantized and refuses to be cast or saved: a fresh one
    takes its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with _told(Checkpoint(path, str(path), "")), quiet():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, **where)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        weights = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
        model = AutoModelForCausalLM.from_config(config).float()
        missing = model.load_state_dict(weights, strict=False).missing_keys
        model.tie_weights()
        if missing:
            raise ValueError(f"weights are missing: {', '.join(missing[:3])}")
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(path.parent, **where).save_pretrained(work)


@contextlib.contextmanager
def _told(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever transformers raises over a model it cannot load is the user's to know, in one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[0][:300] if lines else type(error).__name__
        raise UserError(f"{checkpoint.source}: transformers cannot load it: {detail}") from error
