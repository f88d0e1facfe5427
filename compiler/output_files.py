"""The names beside an output file: hidden temporary ones while it is written, and data files named by their content."""

import contextlib
import errno
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from qcompile.passes.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def data_path(model: Path, digest: str) -> Path:
    """Where the weights of `model` go: a name that says their content, so that no other content ever replaces them."""
    return model.with_name(f"{model.stem}-{digest[:12]}.data")


@contextlib.contextmanager
def temporary(path: Path, kind: str) -> Iterator[Path]:
    """A hidden name beside `path` that says what it is for and which process writes it; gone at the end."""
    name = path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp")
    try:
        yield name
    finally:
        name.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the file system while `path` is written, as UserErrors."""
    try:
        yield
    except OSError as error:
        hint = "free some space or write elsewhere" if error.errno in _NO_SPACE else "choose another place with -o"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """`path` inside a hidden folder beside it, where the output can be tried before `publish`; gone at the end."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.stage.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        folder.mkdir()
    try:
        yield folder / path.name
    finally:
        _remove(folder)


def publish(staged: Sequence[Path], path: Path) -> tuple[Path, ...]:
    """Move a staged model, and its data if there is any, to `path`; a reader sees the old model or the new one."""
    model, *data = staged
    targets = [path.with_name(file.name) for file in data]
    with writing(path):
        replace_pair((data[0], targets[0]) if data else None, (model, path))
        remove_unmentioned(path)
    return (path, *targets)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle(file: BinaryIO) -> None:
    """Have the file's content on the disk, so that a rename never shows a name without it."""
    file.flush()
    os.fsync(file.fileno())


def replace_pair(data: tuple[Path, Path] | None, model: tuple[Path, Path]) -> None:
    """Rename (from, to) first the data, under a name no model mentions yet, then the model that mentions it."""
    new = data is not None and not data[1].exists()
    try:
        if data is not None:
            os.replace(*data)
            _settle_folder(data[1].parent)
        os.replace(*model)
    except BaseException:
        if data is not None and new and model[0].exists():  # an interrupt may come right after the second rename
            data[1].unlink(missing_ok=True)
        raise
    _settle_folder(model[1].parent)


def _settle_folder(folder: Path) -> None:
    """The same for the names in a folder; file systems and platforms that know no such thing are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_stale(path: Path) -> None:
    """Remove the temporary files of the same output that killed processes left behind."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.\w+\.tmp")
    for file in path.parent.iterdir():
        match = pattern.fullmatch(file.name)
        if match and not _alive(int(match[1])):
            _remove(file)


def remove_unmentioned(path: Path) -> None:
    """Remove data files of this output's earlier versions that no model in the folder mentions any more."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{12}\.data")
    candidates = [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    if len(candidates) < 2 and all(_mentions(path, file.name) for file in candidates):
        return
    models = list(path.parent.glob("*.onnx")) + ([] if path.suffix == ".onnx" else [path])
    for file in candidates:
        if not any(_mentions(model, file.name) for model in models):
            file.unlink(missing_ok=True)


def _mentions(model: Path, name: str) -> bool:
    if not model.is_file():  # gone, or a pipe, which would wait for a writer
        return False
    try:
        with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name.encode()) >= 0
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # empty files cannot be mapped; what cannot be read may mention anything
        return model.stat().st_size > 0


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
