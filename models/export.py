"""`qcompile export`: a Hugging Face folder, a GGUF file or a zoo model into model.onnx, checked against torch."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.models import cache, check, hf, publish, tidy, trace, zoo
from qcompile.passes.errors import UserError

DTYPES = ("fp32", "fp16")
MODEL, DATA, RECORD = "model.onnx", "model.onnx.data", publish.RECORD

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the model's path, bytes of model and external data, seconds, and export.json's content."""

    path: Path
    size: int
    seconds: float
    record: dict[str, Any]


def export_model(
    source: str | Path,
    output_dir: Path | str,
    *,
    open_model: check.OpenModel,
    kv_cache: bool = False,
    dtype: str = "fp32",
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write model.onnx (+ model.onnx.data), tokenizer, config.json and export.json into `output_dir`.

    source: a Hugging Face folder, a .gguf file, or a zoo name. Decoders: input_ids, attention_mask (batch, sequence) to
    logits; with `kv_cache` also position_ids and past_key_values.{i}.key / .value (batch, kv_heads, past_sequence,
    head_dim) to present.{i}.key / .value. Encoders: to last_hidden_state. Opset 21, dynamic batch and sequence.
    open_model runs a model file in ONNX Runtime: the graph must agree with torch before anything appears in
    `output_dir`. max_layers keeps only the first layers, for tests and trials. progress is told each step.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {' or '.join(DTYPES)}, got {dtype!r}")
    started, say, target = time.monotonic(), progress or (lambda step: None), Path(output_dir)
    with publish.staging(target, source) as work:
        if str(source) in zoo.ZOO and zoo.find(str(source)).is_onnx:
            if kv_cache or dtype != "fp32" or max_layers is not None:
                raise UserError(f"{source} is ONNX already and is copied as it is: export options do not apply")
            record = _copy_onnx(str(source), work, say)
        else:
            checkpoint = _checkpoint(source, say)
            record = _export(checkpoint, work, open_model, kv_cache, dtype, max_layers, say)
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        say(f"writing {target}")
        size = sum((work / name).stat().st_size for name in (MODEL, DATA) if (work / name).is_file())
        publish.publish(work, target)
    return Exported(target / MODEL, size, time.monotonic() - started, record)


def _checkpoint(source: str | Path, say: Progress) -> hf.Checkpoint:
    hf.require_export_extra()
    name, path = str(source), Path(source).expanduser()
    if name in zoo.ZOO:
        say(f"fetching {name}")
        path = zoo.fetch(name)
    if path.is_dir():
        return hf.open_folder(path, name)
    if path.suffix.lower() == ".gguf" and path.is_file():
        say("reading the GGUF file (kept in the cache for next time)")
        return hf.open_gguf(path, name)
    if path.suffix.lower() == ".onnx":
        raise UserError(f"{source} is an ONNX file already: compile it with `qcompile {source}`")
    raise UserError(f"{source}: no Hugging Face folder, no .gguf file, and no zoo model ({', '.join(zoo.ZOO)})")


def _export(
    checkpoint: hf.Checkpoint,
    work: Path,
    open_model: check.OpenModel,
    kv_cache: bool,
    dtype: str,
    max_layers: int | None,
    say: Progress,
) -> dict[str, Any]:
    say("loading the model in torch")
    config = hf.load_config(checkpoint)
    decoder = hf.is_decoder(config)
    hf.cut_layers(config, max_layers)
    model = hf.load_model(checkpoint, config, decoder=decoder, dtype=dtype)
    hf.copy_companions(checkpoint, config, work)
    signature = trace.signature_of(model, decoder=decoder, kv_cache=kv_cache)
    module = trace.wrap(model, signature, decoder=decoder)
    prompt, ids = check.prompt_ids(work, int(config.vocab_size))
    first = check.batch(ids, signature) | trace.empty_past(model, signature)

    say("translating the graph to ONNX (a minute; with a KV cache some minutes)")
    onnx_model = trace.to_onnx(module, signature, trace.examples(first, signature))
    say("writing the graph")
    tidy.tidy(onnx_model, signature, prefix="m.")
    with _disk(work):
        ir.save(onnx_model, work / MODEL, external_data=DATA)
    say("checking the graph against torch")
    checked = check.compare(module, work / MODEL, signature, first, prompt, open_model=open_model, dtype=dtype)
    return {
        "source": checkpoint.source,
        "source_sha256": checkpoint.sha256,
        "model_type": config.model_type,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "layers": max_layers,
        "opset": trace.OPSET,
        "check": checked.as_dict(),
        "versions": _versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    }


def _copy_onnx(name: str, work: Path, say: Progress) -> dict[str, Any]:
    say(f"fetching {name}")
    path = zoo.fetch(name)
    with _disk(work):
        shutil.copyfile(path, work / MODEL)
    return {"source": name, "source_sha256": cache.sha256([path]), "check": "copied as it is", "versions": {}}


def _versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


@contextmanager
def _disk(work: Path) -> Iterator[None]:
    """A full or failing disk is the user's to know."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{work.parent}: cannot write the model ({reason})") from error
