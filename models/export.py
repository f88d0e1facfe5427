"""`qcompile export`: a Hugging Face folder, a GGUF file or a zoo model into model.onnx, checked against torch."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from qcompile.models import cache, check, hf, kinds, parts, publish, tidy, trace, zoo
from qcompile.models.gguf_file import GGUFFile
from qcompile.models.licences import licence_files
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

DTYPES = ("fp32", "fp16")
LOGITS = ("all", "last")
MODEL, RECORD = "model.onnx", publish.RECORD

Say = Callable[[str], None]


class Keeps(Protocol):
    """Writes graphs with the quantized tensors of a GGUF file in place of the floats that were made of them."""

    def save(self, model: ir.Model, path: Path) -> None:
        """Write a graph to `path` and `path`.data."""

    def record(self) -> dict[str, Any]:
        """What became of each weight, for export.json."""


Keep = Callable[[GGUFFile], Keeps]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the path of the (first) graph, bytes of graphs and data, seconds, export.json's content."""

    path: Path
    size: int
    seconds: float
    record: dict[str, Any]


def export_model(
    source: str | Path,
    output_dir: Path | str,
    *,
    open_model: check.OpenModel,
    kv_cache: bool | None = False,
    dtype: str = "fp32",
    logits: str = "all",
    max_layers: int | None = None,
    keep: Keep | None = None,
    progress: Say | None = None,
) -> Exported:
    """Write model.onnx (+ model.onnx.data), tokenizer, config.json and export.json into `output_dir`.

    source: a Hugging Face folder, a .gguf file, or a zoo name. Decoders: input_ids, attention_mask (batch, sequence) to
    logits; with `kv_cache` also position_ids and past_key_values.{i}.key / .value (batch, kv_heads, past_sequence,
    head_dim) to present.{i}.key / .value. logits: "last" for the last row of each sequence only, (batch, 1, V), see
    trace.score_last_row. Encoders: to last_hidden_state. Opset 21, dynamic batch and sequence.
    Other models (docs/export.md): vision and speech as model.onnx, CLIP and its like as text_model.onnx and
    vision_model.onnx, encoders with decoders as encoder.onnx and decoder.onnx (and decoder_with_past.onnx).
    kv_cache None: decoders of text have caches, others do not.
    open_model runs a model file in ONNX Runtime: the graph must agree with torch before anything appears in
    `output_dir`. max_layers keeps only the first layers, for tests and trials. progress is told each step.
    keep: for a GGUF file, what writes its quantized tensors as they are.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {' or '.join(DTYPES)}, got {dtype!r}")
    if logits not in LOGITS:
        raise UserError(f"--logits is {' or '.join(LOGITS)}, got {logits!r}")
    if logits != "all" and kv_cache is False:
        raise UserError(f"--logits {logits} is for decoders that keep caches: add --kv-cache")
    if keep is not None and dtype != "fp32":
        raise UserError("--keep-quantized gives float32 graphs: in float16 the file's numbers would be rounded")
    started, say, target = time.monotonic(), progress or (lambda step: None), Path(output_dir)
    with publish.staging(target, source) as work:
        if str(source) in zoo.ZOO and zoo.find(str(source)).is_onnx:
            if kv_cache or dtype != "fp32" or max_layers is not None or keep is not None:
                raise UserError(f"{source} is ONNX already and is copied as it is: export options do not apply")
            record = _copy_onnx(str(source), work, say)
        else:
            checkpoint = _checkpoint(source, say)
            kept = _kept(checkpoint, keep, say)
            record = _export(checkpoint, work, open_model, kv_cache, dtype, logits, max_layers, kept, say)
        if str(source) in zoo.ZOO:
            own = zoo.fetch(str(source))
            for terms in licence_files(own if own.is_dir() else own.parent):
                shutil.copyfile(terms, work / terms.name)
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        say(f"writing {target}")
        written = [name for graph in publish.graphs(work) for name in (graph, f"{graph}.data")]
        size = sum((work / name).stat().st_size for name in written if (work / name).is_file())
        first = publish.graphs(work)[0]
        publish.publish(work, target)
    return Exported(target / first, size, time.monotonic() - started, record)


def _checkpoint(source: str | Path, say: Say) -> hf.Checkpoint:
    hf.require_export_extra()
    name, path = str(source), Path(os.path.expanduser(source))
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
    known = f"({', '.join(zoo.ZOO)}){near(str(source), zoo.ZOO)}"
    raise UserError(f"{source}: no Hugging Face folder, no .gguf file, and no zoo model {known}")


def _kept(checkpoint: hf.Checkpoint, keep: Keep | None, say: Say) -> Keeps | None:
    if keep is None:
        return None
    if checkpoint.gguf is None:
        raise UserError(f"{checkpoint.source} is no GGUF file: --keep-quantized keeps the quantized tensors of one")
    say("looking through the tensors of the GGUF file")
    return keep(GGUFFile(checkpoint.gguf))


def _export(
    checkpoint: hf.Checkpoint,
    work: Path,
    open_model: check.OpenModel,
    kv_cache: bool | None,
    dtype: str,
    logits: str,
    max_layers: int | None,
    kept: Keeps | None,
    say: Say,
) -> dict[str, Any]:
    say("loading the model in torch")
    config = hf.load_config(checkpoint)
    kind = kinds.kind_of(config)
    if logits != "all" and kind != kinds.DECODER:
        raise UserError(f"{config.model_type} is no decoder of text alone: --logits {logits} does not apply")
    hf.cut_layers(config, max_layers)
    model = hf.load_model(checkpoint, config, kind=kind, dtype=dtype)
    if kv_cache is None:
        kv_cache = kind == kinds.DECODER and trace.takes_caches(model)
    hf.copy_companions(checkpoint, config, work)
    run = Exporting(work, open_model, dtype, say, kept)
    if kind in (kinds.DECODER, kinds.ENCODER):
        checks = {MODEL: run.text(model, decoder=kind == kinds.DECODER, kv_cache=kv_cache, last_row=logits == "last")}
    else:
        made = parts.parts_of(model, kind, checkpoint.folder, kv_cache=kv_cache, dtype=dtype)
        checks = {f"{part.name}.onnx": run.part(part) for part in made}
    worst = max(checks.values(), key=lambda checked: checked.max_relative_error)
    return {
        "source": checkpoint.source,
        "source_sha256": checkpoint.sha256,
        "model_type": config.model_type,
        "kind": kind,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "logits": logits,
        "layers": max_layers,
        "opset": trace.OPSET,
        "check": worst.as_dict(),
        "graphs": {name: checked.max_relative_error for name, checked in checks.items()},
        "versions": _versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    } | ({} if kept is None else {"kept": kept.record()})


@dataclass(frozen=True)
class Exporting:
    """Writes graphs into `work` and checks each against its torch module."""

    work: Path
    open_model: check.OpenModel
    dtype: str
    say: Say
    kept: Keeps | None = None

    def text(self, model: Any, *, decoder: bool, kv_cache: bool, last_row: bool) -> check.Checked:
        """A text model as model.onnx, checked on a prompt."""
        if last_row:
            trace.score_last_row(model)
        signature = trace.signature_of(model, decoder=decoder, kv_cache=kv_cache, last_row=last_row)
        module = trace.wrap(model, signature, decoder=decoder)
        prompt, ids = check.prompt_ids(self.work, int(model.config.vocab_size))
        first = check.batch(ids, signature) | trace.empty_past(model, signature)
        self._write(MODEL, module, signature, trace.examples(first, signature))
        self.say("checking the graph against torch")
        how = {"open_model": self.open_model, "dtype": self.dtype}
        return check.compare(module, self.work / MODEL, signature, first, prompt, **how)  # type: ignore[arg-type]

    def part(self, part: parts.Part) -> check.Checked:
        """One graph of several, checked at the sizes it was traced at and at others."""
        import torch

        name, signature = f"{part.name}.onnx", part.signature
        examples = [torch.from_numpy(array) for array in part.feeds(parts.TRACED).values()]
        self._write(name, part.module, signature, examples)
        self.say(f"checking {name} against torch")
        steps = {"traced": part.feeds(parts.TRACED), "other sizes": part.feeds(parts.CHECKED)}
        how = {"open_model": self.open_model, "dtype": self.dtype}
        return check.compare_on(part.module, self.work / name, signature, steps, "(random)", **how)  # type: ignore[arg-type]

    def _write(self, name: str, module: Any, signature: trace.Signature, examples: Sequence[Any]) -> None:
        self.say(f"translating {name.removesuffix('.onnx')} to ONNX (a minute; with a KV cache some minutes)")
        onnx_model = trace.to_onnx(module, signature, examples)
        self.say(f"writing {name}")
        tidy.tidy(onnx_model, signature, prefix="m.")
        with _disk(self.work):
            if self.kept is not None:
                self.kept.save(onnx_model, self.work / name)
            else:
                ir.save(onnx_model, self.work / name, external_data=f"{name}.data")


def _copy_onnx(name: str, work: Path, say: Say) -> dict[str, Any]:
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
