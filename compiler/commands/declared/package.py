"""Options of `qcompile package`."""

from pathlib import Path
from typing import Annotated, Literal

from qcompile.compiler.commands.options import Common, Kernels, command, option, positional


@command()
class Options(Common):
    """Put a model, compiled or float, into a folder that an application loads as it is.
    genai: a decoder with caches for onnxruntime_genai.Model(DIR). DIR gets model.onnx and its weights,
    genai_config.json (names and sizes of the graph, the rest of the files beside the model), the tokenizer, the chat
    template, native kernels and licences (docs/genai.md).
    ort: any model, its weights inside model.onnx where they are small, native kernels and how to register them.
    transformers.js: DIR gets config.json, the tokenizer and onnx/model_q4.onnx or the like (docs/web.md)."""

    model: Annotated[Path, positional("MODEL", "a compiled decoder, or a float one, or its folder")]
    output: Annotated[Path, option("the folder to write", "DIR", alias="-o")]
    kind: Annotated[
        Literal["genai", "ort", "transformers.js"],
        option("what is to run it", "{genai,ort,transformers.js}", name="--for"),
    ]
    tokenizer: Annotated[
        Path | None,
        option("folder with tokenizer.json, config.json and generation_config.json (default: beside the model)", "DIR"),
    ] = None
    kernels: Annotated[
        Kernels,
        option(
            "native kernels: those of this machine where there are any (auto), an error without (native), none "
            "(portable)",
            "{auto,native,portable}",
        ),
    ] = "auto"
