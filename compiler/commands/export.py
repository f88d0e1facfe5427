"""`qcompile export`: a Hugging Face folder, a GGUF file or a zoo model to ONNX."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.table import Table

from qcompile.compiler.api.folders import open_model
from qcompile.compiler.api.kept import Keeper, KeptWeight, summary
from qcompile.compiler.commands.declared.export import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import Bar, console
from qcompile.models import export, kinds, zoo
from qcompile.passes import lists
from qcompile.passes.errors import UserError


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
            keep=Keeper if args.keep_quantized else None,
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
    if kept := done.record.get("kept"):
        _tell_kept([KeptWeight(**own) for own in kept["weights"]], kept["file_bytes"], done.size, screen)
    else:
        screen.print(f"next: qcompile {folder} --passes {passes}", highlight=False)
    return {"path": str(done.path), "bytes": done.size, "seconds": done.seconds, **done.record}


# Passes to try first: those of a text model need nothing but its tokenizer, others nothing at all.
_NEXT = {
    kinds.DECODER: lists.QUICK,
    kinds.ENCODER: lists.QUICK,
    kinds.VISION: f"{lists.CORRECTED} --calibration FOLDER_OF_IMAGES",
}


def _tell_kept(weights: Sequence[KeptWeight], file: int, written: int, screen: Console) -> None:
    """What was kept as what; then what was not, and why."""
    table = Table("in the file", "kept as", "weights", "MB", title="Quantized tensors that were kept")
    for kind, form, count, size in summary(weights):
        table.add_row(kind, form, str(count), f"{size / 1e6:.1f}")
    if table.rows:
        screen.print(table)
    for reason, names in groupby(sorted((own.reason, own.weight) for own in weights if own.reason), lambda own: own[0]):
        left = [name for _, name in names]
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        screen.print(f"left in float: {left[0]}{more}: {reason}", highlight=False)
    screen.print(f"{written / file:.2f} times the size of the GGUF file", highlight=False)


def _zoo_table() -> Table:
    table = Table("name", "model", "licence", "package", title="Zoo: pinned models that pip fetches")
    for model in zoo.ZOO.values():
        table.add_row(model.name, model.description, model.licence, f"{model.package} {model.version}")
    return table
