"""Folders in, folders out: what is compiled of a folder, and what goes beside the result."""

import filecmp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.compiler.files.cache import write_atomically
from qcompile.compiler.files.folders import graphs, is_checkpoint
from qcompile.compiler.package.beside import companions
from qcompile.models import cache, hf
from qcompile.models.export import RECORD, export_model
from qcompile.models.trace import Arrays
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run, session


def open_model(path: Path) -> Any:
    """A model file as a function from inputs by name to outputs by name, on the CPU."""
    opened = session(path, kernels="portable")
    names = [output.name for output in opened.get_outputs()]

    def call(feeds: Arrays) -> Arrays:
        return dict(zip(names, run(opened, names, feeds), strict=True))

    return call


def exported(source: Path, say: Callable[[str], None] = lambda step: None) -> Path:
    """The folder of graphs that a folder stands for: itself, or the export of a Hugging Face folder or GGUF file.

    An export (decoders with a KV cache) is kept in the cache, under the hash of its weights: the next compile finds it.
    """
    if not is_checkpoint(source):
        if not graphs(source):
            raise UserError(f"{source}: no .onnx model in it, and no Hugging Face model (config.json and weights)")
        if len(found := graphs(source)) > 1 and not (source / RECORD).is_file():
            names = ", ".join(own.name for own in found)
            raise UserError(f"{source} holds {len(found)} models ({names}), and no {RECORD} makes them one: give one")
        return source
    say("hashing the weights")
    known = hf.open_folder(source, str(source)).sha256 if source.is_dir() else cache.sha256([source])

    def fill(work: Path) -> None:
        export_model(source, work / "model", open_model=open_model, kv_cache=None, progress=say)

    return cache.entry(f"export/{source.name}-{known[:16]}", fill, complete=["model/export.json"]) / "model"


def home(graph: Path) -> Path:
    """The folder in which the files of a graph lie: its own, or the one above `onnx`."""
    folder = graph.absolute().parent
    return folder.parent if folder.name == "onnx" else folder


def strangers(source: Path, target: Path) -> list[Path]:
    """Whatever in `target` has the name of a companion in `source` and is no file of its content.

    Whose it is cannot be told: a report lies beside the user's own model, too, where that was compiled in its place.
    """
    found = [(path, target / path.name) for path in companions(source)]
    return [other for path, other in found if os.path.lexists(other) and not _same(path, other)]


def _same(path: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(path, other, shallow=False)


def copy_companions(source: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Copy what lies beside a model into the folder of what was made of it: tokenizer, configuration, chat template.

    Nothing is replaced: where there are `strangers` now, behind the work, nothing is copied. Returns (the files that
    were written, the strangers).
    """
    if others := strangers(source, target):
        return [], others
    copied = []
    for path in companions(source):
        other = target / path.name
        if not os.path.lexists(other):
            write_atomically(other, path.read_bytes())
            copied.append(other)
    return copied, []


def check_folder(source: Path, folder: Path) -> None:
    """Raise UserError where the result would be mixed with its source, or with files of something else."""
    if folder.exists() and folder.samefile(source):
        raise UserError(f"{folder} is the folder that is compiled: choose another one with -o DIR")
    if found := strangers(home(graphs(source)[0]), folder):
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder} has files of something else ({names}): choose another folder with -o DIR, or remove them"
        )


def within(output: str | os.PathLike[str]) -> bool:
    """Whether an output names the folder to write to, not the file."""
    return Path(output).is_dir() or os.fspath(output).endswith(("/", os.sep))
