"""The names beside an output file: hidden temporary ones while it is written, and data files named by their content.

Invariants, whoever is killed when:
1. Names change only under the lock of the output's stem (`.model.lock` for model.onnx and model-….data): two compiles
   to one output follow one another, and what lies there is of one of them, model, data and reports.
2. A model appears after its data, and data goes only when no model in the folder names it. None will, for whoever is
   about to publish data holds the lock. Data that was just replaced stays a moment longer: a reader may have opened
   its model, and be about to open it.
3. What a process writes lies in a hidden folder that it holds a lock in; without a holder, the folder is litter. What
   it only tries a place with is empty, and anybody's to remove: nobody minds if it is gone.
"""

import contextlib
import errno
import glob
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from qcompile.compiler.files import locks
from qcompile.passes.errors import UserError

# Ends of the names of hidden folders, and the file in those of the first kind whose lock says that their process lives.
_STAGE, _PROBE, _ALIVE = ".stage.tmp", ".probe.tmp", ".alive"
_MAX_PROTO = 2**31
# Seconds from reading a model file to opening its data.
_MOMENT = 0.25
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def data_path(model: Path, digest: str) -> Path:
    """Where the weights of `model` go: a name that says their content, so that no other content ever replaces them."""
    return model.with_name(f"{model.stem}-{digest[:12]}.data")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the file system while `path` is written, as UserErrors."""
    try:
        yield
    except OSError as error:
        hint = "free some space or write elsewhere" if is_full(error) else "choose another place with -o"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


def is_full(error: BaseException | None) -> bool:
    """Whether a failure is for lack of room on the disk."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """`path` inside a hidden folder beside it, where the output can be tried before `publish`; gone at the end."""
    check_replaceable(path)
    with contextlib.ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locks.exclusive(lock(path)):  # or another might find the folder before its lock is held
                remove_stale(path)
                folder = _hidden(path, path.parent, _STAGE)
                stack.callback(_remove, folder)
                stack.enter_context(locks.alive(folder / _ALIVE))
        yield folder / path.name


def publish(staged: Sequence[Path], path: Path, beside: Sequence[Path] = ()) -> tuple[Path, ...]:
    """Move a staged model, and its data if there is any, to `path`, then the staged files `beside` it (reports).

    A reader sees the old model or the new one. UserError where something else than a file lies in the way.
    """
    model, *data = staged
    targets = [path.with_name(file.name) for file in data]
    with writing(path), locks.exclusive(lock(path)):
        for target in (path, *targets, *(path.with_name(file.name) for file in beside)):
            check_replaceable(target)
        before = [file for file in data_files(path) if _mentions(path, file.name)]
        replace_pair((data[0], targets[0]) if data else None, (model, path))
        for file in beside:
            os.replace(file, path.with_name(file.name))
        if any(not _mentions(path, file.name) for file in before):
            time.sleep(_MOMENT)
        remove_unmentioned(path)
    return (path, *targets)


def publish_named(staged: Sequence[Path], path: Path) -> tuple[Path, ...]:
    """Move a staged model and data files whose names its readers fix to `path`.

    The old model goes first and the new one comes last: at no moment does a model lie beside data that is not its own.
    Earlier data files of such names ("model.onnx_data_1") that the new model has not are removed.
    """
    model, *data = staged
    targets = [path.with_name(file.name) for file in data]
    with writing(path), locks.exclusive(lock(path)):
        for target in (path, *targets):
            check_replaceable(target)
        path.unlink(missing_ok=True)
        for old in path.parent.glob(f"{glob.escape(path.name)}_data*"):
            old.unlink()
        for file, target in zip(data, targets, strict=True):
            os.replace(file, target)
        os.replace(model, path)
        _settle_folder(path.parent)
    return (path, *targets)


def write_text(path: Path, text: str) -> None:
    """Write a file that names no data, whole or not at all."""
    with staging(path) as staged:
        with writing(path):
            staged.write_text(text, encoding="utf-8")
        replace_file(staged, path)


def replace_file(staged: Path, path: Path) -> None:
    """Move a staged file that names no data to `path`."""
    with writing(path):
        check_replaceable(path)
        os.replace(staged, path)


def check_replaceable(path: Path) -> None:
    """Raise UserError unless the path is a regular file, or nothing: a device or a FIFO is not to be replaced by one.

    A link to a regular file is replaced itself; what it leads to stays as it is.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there, or nothing to be had there, as writing will tell
        return
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS if test(mode)), "no regular file")
        raise UserError(f"{path} is {kind}, and would be replaced by a file; choose another name with -o")


def check_place(path: Path) -> None:
    """Raise UserError where a file at `path` cannot be made or replaced: said before the work, not behind it.

    Only trying tells: modes say nothing to root, of /proc, or of a name that is too long.
    """
    check_replaceable(path)
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is a file, not a folder; choose another place with -o")
    try:
        _remove(_hidden(path, folder, _PROBE))
    except OSError as error:
        reason = "is read-only" if error.errno in _DENIED else f"takes no file of that name ({error.strerror or error})"
        raise UserError(f"cannot write {path}: the folder {folder} {reason}; choose another place with -o") from error


def _hidden(path: Path, folder: Path, end: str) -> Path:
    """A hidden folder for what goes to `path`, inside `folder`."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=end, dir=folder))


def lock(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


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
    """Remove what killed processes left behind: hidden folders of the same output, under its lock, and of whatever
    shares its stem (reports) what a place was tried with.
    """
    for folder in path.parent.glob(f".{glob.escape(path.stem)}.*{_PROBE}"):
        _remove(folder)
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*{_STAGE}"):
        if folder.is_dir() and not folder.is_symlink() and locks.is_free(folder / _ALIVE):
            _remove(folder)


def data_files(path: Path) -> list[Path]:
    """The data files of all versions of this output that are there."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{12}\.data")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name) and _is_file(file)]


def remove_unmentioned(path: Path) -> None:
    """Remove data files of this output's earlier versions that no model in the folder mentions; under its lock."""
    candidates = data_files(path)
    if all(_mentions(path, file.name) for file in candidates):
        return
    models = [
        file for file in path.parent.iterdir() if file not in candidates and _is_file(file) and may_be_model(file)
    ]
    for file in candidates:
        if not any(_mentions(model, file.name) for model in models):
            file.unlink(missing_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def models_that_mention(path: Path) -> Iterator[Path]:
    """The files beside `path`, in order, that may be models and in which its name stands."""
    for file in sorted(path.absolute().parent.iterdir()):
        if file.name != path.name and _is_file(file) and may_be_model(file) and _mentions(file, path.name):
            yield file


def may_be_model(path: Path) -> bool:
    """Whether a file may hold a model, by its name or by its first byte, the tag of `ir_version`."""
    if path.suffix == ".onnx":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"\x08" and path.stat().st_size < _MAX_PROTO
    except OSError:
        return True


def _mentions(model: Path, name: str) -> bool:
    try:
        with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name.encode()) >= 0
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # empty files cannot be mapped; what cannot be read may mention anything
        return model.stat().st_size > 0
