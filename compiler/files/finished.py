"""Walks that are finished, in a folder that the user names: `walk-KEY`, with what a folder of `work` has.

Invariant: what lies in `walk-KEY` never changes. It comes there by one rename, and whoever takes it has the same files
(hard links; copies on another disk), in which nothing is written behind the last segment.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path

from qcompile.compiler.files import publish
from qcompile.compiler.files.header import (
    CHECKPOINT,
    TENSORS,
    Damaged,
    Header,
    check_sizes,
    has_checkpoint,
    is_own,
    proven,
)
from qcompile.passes.errors import UserError

_log = logging.getLogger(__name__)
_PART = ".walk-"


def check(shelf: Path) -> None:
    """UserError, before the work, for a place where no folder can be."""
    there = shelf.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--checkpoints {shelf}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--checkpoints {shelf}: nothing can be written in {there}")


def place(shelf: Path, key: str) -> Path:
    """The folder of the walk of that key."""
    return shelf / f"walk-{key}"


def whole(shelf: Path, key: str) -> Header:
    """What the walk of that key says of itself; Damaged where its files are not whole."""
    own = place(shelf, key)
    header, _ = proven(own)
    if header.key != key or header.done < header.of:
        raise Damaged(f"{own} is another walk")
    check_sizes(own, header)
    return header


def take(shelf: Path, header: Header, folder: Path) -> None:
    """Have the files of that walk in `folder`, too; Damaged where that cannot be."""
    own = place(shelf, header.key)
    try:
        for name in _names(own, header):
            _share(own / name, folder / name)
    except OSError as error:
        raise Damaged(f"{own} cannot be taken ({error.strerror or error})") from error


def put(folder: Path | None, header: Header | None, shelf: Path) -> None:
    """Keep the walk whose folder that is, instead of one of the same key; a warning where that cannot be."""
    if folder is None or header is None or header.done < header.of:
        _log.warning("the walk is not kept in %s: there is no checkpoint behind it", shelf)
        return
    own = place(shelf, header.key)
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=shelf))
        try:
            if not is_own(part):
                raise PermissionError(errno.EPERM, "others can write whatever is there")
            for name in _names(folder, header):
                _share(folder / name, part / name)
            shutil.rmtree(own, ignore_errors=True)
            os.replace(part, own)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if not has_checkpoint(own):  # which another process has put there meanwhile
            _log.warning("the walk is not kept in %s: %s", shelf, error.strerror or error)


def _names(folder: Path, header: Header) -> list[str]:
    """The files of a walk, the checkpoint last."""
    return [*([TENSORS] if (folder / TENSORS).exists() else []), header.arrays, CHECKPOINT]


def _share(file: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(file, target)
        return
    shutil.copyfile(file, target)
    with open(target, "r+b") as written:
        publish.settle(written)
