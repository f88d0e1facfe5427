"""`qcompile export`: a Hugging Face folder, a GGUF file or a zoo model to ONNX."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table

from qcompile.compiler.api.folders import open_model
from qcompile.compiler.commands.options import Common, Document, command, option, positional
from qcompile.compiler.console.terminal import Bar, console
from qcompile.models import export, kinds, zoo
from qcompile.passes import lists
from qcompile.passes.errors import UserError

_EXAMPLES = """\
examples:
  qcompile export smollm2-135m -o smollm2
  qcompile export ./my-model -o my-model-onnx --kv-cache --dtype fp16
  qcompile export ./my-model -o my-model-onnx --for genai
"""


@command()
class Options(Common):
    """Export a model to ONNX (opset 21, dynamic batch and sequence), and check it against torch on a real prompt.

    SOURCE is a Hugging Face folder, a .gguf file, or the name of a zoo model (--list). DIR gets model.onnx,
    model.onnx.data, the tokenizer, config.json and export.json (versions, source hash, the error that the check found).
    Models of several parts become several graphs: CLIP and its like text_model.onnx and vision_model.onnx, T5, BART,
    Whisper encoder.onnx and decoder.onnx (with --kv-cache also decoder_with_past.onnx). docs/export.md tells more.
    Needs the extra qcompile-onnx[export]; zoo models are downloaded once with pip, hash-checked, and kept in
    ~/.cache/qcompile (QCOMPILE_CACHE moves it)."""

    epilog = _EXAMPLES

    source: Annotated[str | None, positional("SOURCE", "a Hugging Face folder, a .gguf file, or a zoo name")] = None
    output: Annotated[Path | None, option("the folder to write; an earlier export is replaced", "DIR", alias="-o")] = (
        None
    )
    kv_cache: Annotated[
        bool | None,
        option(
            "past keys and values as inputs, present ones as outputs: generates token by token; --no-kv-cache: without "
            "(default: decoders of text with, others without)",
            negative="--no-kv-cache",
        ),
    ] = None
    logits: Annotated[
        Literal["all", "last"] | None,
        option(
            "rows that a decoder with caches scores: all, or the last of each sequence only, which spares prompts the "
            "work of the others (default: all; with --for genai: last)",
            "{all,last}",
        ),
    ] = None
    application: Annotated[
        Literal["genai"] | None,
        option("genai: --kv-cache --logits last, unless told otherwise", "{genai}", name="--for"),
    ] = None
    dtype: Annotated[Literal["fp32", "fp16"], option("type of weights and activations (fp32)", "{fp32,fp16}")] = "fp32"
    layers: Annotated[int | None, option("keep only the first N layers, for tests and trials", "N")] = None
    list: Annotated[bool, option("list the zoo and stop")] = False


def run(args: Options) -> Document:
    """Export, and say what to type next."""
    screen = console()
    if args.list:
        console(answer=True).print(_zoo_table())
        return [asdict(model) for model in zoo.ZOO.values()]
    if args.source is None or args.output is None:
        raise UserError("give a SOURCE and a folder: qcompile export SOURCE -o DIR (--list shows the zoo)")
    with Bar() as bar:
        done = export.export_model(
            args.source,
            args.output,
            open_model=open_model,
            kv_cache=True if args.application is not None else args.kv_cache,
            dtype=args.dtype,
            logits=args.logits or ("all" if args.application is None else "last"),
            max_layers=args.layers,
            progress=bar.step,
        )
    found = done.record["check"]
    if isinstance(found, dict):
        error, tokens = found["max_relative_error"], found["tokens"]
        on = f" on {tokens} tokens" if tokens else ""
        screen.print(f"agrees with torch{on}: relative error {error:.1e} (at most {found['tolerance']:.0e})")
    graphs = list(done.record.get("graphs", ())) or [done.path.name]
    wrote = done.path.with_name(", ".join(graphs))
    screen.print(f"wrote {wrote} ({done.size / 1e6:.0f} MB) in {done.seconds:.0f} s", highlight=False)
    folder, passes = shlex.quote(str(args.output)), _NEXT.get(done.record.get("kind", ""), lists.PLAIN)
    screen.print(f"next: qcompile {folder} --passes {passes}", highlight=False)
    return {"path": str(done.path), "bytes": done.size, "seconds": done.seconds, **done.record}


# Passes to try first: those of a text model need nothing but its tokenizer, others nothing at all.
_NEXT = {
    kinds.DECODER: lists.QUICK,
    kinds.ENCODER: lists.QUICK,
    kinds.VISION: f"{lists.CORRECTED} --calibration FOLDER_OF_IMAGES",
}


def _zoo_table() -> Table:
    table = Table("name", "model", "licence", "package", title="Zoo: pinned models that pip fetches")
    for model in zoo.ZOO.values():
        table.add_row(model.name, model.description, model.licence, f"{model.package} {model.version}")
    return table
