"""`qcompile package`: the folder that an application copies."""

from pathlib import Path

from qcompile.compiler.commands.declared.package import Options
from qcompile.compiler.commands.options import Document, changed
from qcompile.compiler.console.terminal import console
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.package.folder import Packaged
from qcompile.compiler.package.kinds import KINDS

_NEXT = {
    "genai": 'onnxruntime_genai.Model("{}"), see docs/genai.md',
    "ort": "{}/README.md, see docs/deploy.md",
    "transformers.js": "env.localModelPath, see docs/web.md",
}


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
