"""`qcompile package`: the folder that an application copies."""

from pathlib import Path
from typing import Annotated, Literal

from qcompile.compiler.commands.options import Common, Document, Kernels, changed, command, option, positional
from qcompile.compiler.console.terminal import console
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.package.folder import Packaged
from qcompile.compiler.package.kinds import KINDS

_NEXT = {
    "genai": 'onnxruntime_genai.Model("{}"), see docs/genai.md',
    "ort": "{}/README.md, see docs/deploy.md",
    "transformers.js": "env.localModelPath, see docs/web.md",
}


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


def run(args: Options) -> Document:
    """Write the folder, and say what is in it."""
    args = changed(args, model=model_file(args.model))
    done = KINDS[args.kind](args.model, args.output, tokenizer=args.tokenizer, kernels=args.kernels)
    tell(done, args.output, args.kind)
    return {"output": str(args.output), "files": list(map(str, done.files)), "lacking": done.lacking}


def tell(done: Packaged, folder: Path, kind: str) -> None:
    """Print what was written, and what is missing."""
    screen = console()
    size = sum(path.stat().st_size for path in done.files)
    names = ", ".join(path.name for path in done.files)
    if done.lacking:
        screen.print(f"no native kernels: {done.lacking}", soft_wrap=True, highlight=False)
    screen.print(f"wrote {folder} ({size / 1e6:.0f} MB): {names}", soft_wrap=True, highlight=False)
    screen.print(f"next: {_NEXT[kind].format(folder)}", soft_wrap=True, highlight=False)
