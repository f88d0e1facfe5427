"""An output folder that appears complete: written beside its place, moved into it at the end."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.passes.errors import UserError

RECORD = "export.json"
_MODEL = "model.onnx"


@contextmanager
def staging(target: Path, source: str | Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; gone afterwards. Refuses a target that may not be overwritten."""
    _refuse(target, source)
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        work.chmod(0o755)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, target: Path) -> None:
    """Move what `work` holds into `target`.

    Case 1: no such folder, or an empty one: `work` becomes it in one rename.
    Case 2: a folder with an earlier export: its graphs go first and the new ones come last, so that at no moment a
    graph lies beside weights that are not its own. Other files in the folder stay.
    """
    known = graphs(target, recorded=True) if (target / RECORD).is_file() else []
    foreign = [name for name in graphs(work) if (target / name).exists() and name not in known]
    if foreign:
        raise UserError(
            f"{target / foreign[0]} exists and was not written by `qcompile export`: give another folder with -o"
        )
    for path in work.iterdir():
        _sync(path)
    try:
        if not target.exists() or not any(target.iterdir()):
            os.replace(work, target.resolve())
        else:
            for name in {*graphs(target), *graphs(work)}:
                (target / name).unlink(missing_ok=True)
            for name in set(graphs(target, recorded=True)) - set(graphs(work)):
                (target / f"{name}.data").unlink(missing_ok=True)
            files = sorted(work.iterdir(), key=lambda path: (path.suffix == ".onnx", path.name == RECORD))
            for path in files:
                os.replace(path, target / path.name)
        _sync(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error


def graphs(folder: Path, *, recorded: bool = False) -> list[str]:
    """Names of the graphs that the export in a folder wrote, and that are there; recorded: or were."""
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("graphs") or {_MODEL: 0}
    except (OSError, ValueError, AttributeError, RecursionError):
        told = {_MODEL: 0}
    names = [name for name in told if Path(name).name == name and name.endswith(".onnx")]
    return [name for name in names if recorded or (folder / name).is_file()]


def _refuse(target: Path, source: str | Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give a folder with -o")
    origin = Path(os.path.expanduser(source))  # which takes "~" as it is where nobody has that name
    if origin.exists() and target.exists() and target.resolve() in (origin.resolve(), origin.resolve().parent):
        raise UserError(f"{target} holds the source {source}: give another folder with -o")
    if (target / _MODEL).exists() and not (target / RECORD).is_file():
        raise UserError(
            f"{target / _MODEL} exists and was not written by `qcompile export`: give another folder with -o"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
