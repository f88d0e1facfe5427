"""The file of a checkpoint: a header in its first line, then a snapshot, both signed by this user (`secret`)."""

import contextlib
import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from qcompile.compiler.files import secret

# What lies in a folder with a checkpoint, beside the arrays that its header names.
CHECKPOINT, TENSORS = "checkpoint", "tensors"


@dataclass(frozen=True)
class Header:
    """The first line of a checkpoint.

    key: of all that decides the result. done, of: finished segments, and all. seconds: worked until then.
    arrays: the name of the file of arrays. arrays_size, tensors_size: bytes of both files. signature: over the other
    fields and what follows.
    """

    key: str
    done: int
    of: int
    seconds: float
    arrays: str
    arrays_size: int
    tensors_size: int
    signature: str = ""

    @property
    def next(self) -> str:
        """Where who takes it up goes on, in words."""
        return f"segment {self.done + 1} of {self.of}" if self.done < self.of else "the end of the segments"


class Damaged(Exception):
    """A checkpoint that is not whole, or not of this user."""


def is_mine(folder: Path) -> bool:
    """Whether a folder is one that this user made."""
    try:
        told = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(told.st_mode) and (not hasattr(os, "getuid") or told.st_uid == os.getuid())


def is_own(folder: Path) -> bool:
    """Whether a folder is one that this user made, and nobody else reads or writes in."""
    with contextlib.suppress(OSError):
        return is_mine(folder) and not (hasattr(os, "getuid") and folder.lstat().st_mode & 0o077)
    return False


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint lies there that nobody else can have written since."""
    return is_own(folder) and (folder / CHECKPOINT).is_file()


def proven(folder: Path) -> tuple[Header, bytes]:
    """The header of a folder's checkpoint and what follows it, as this user signed them; else Damaged."""
    header, found = _parts(folder)
    if not secret.is_signed(_signed(header, found), header.signature):
        raise Damaged(f"{folder / CHECKPOINT} is not whole, or is not of this user on this machine")
    return header, found


def sealed(header: Header, content: bytes) -> tuple[Header, bytes]:
    """The header with its signature, and the file of a checkpoint: what `proven` takes apart."""
    header = replace(header, signature=secret.signature(_signed(header, content)) or "")
    return header, _line(header) + b"\n" + content


def check_sizes(folder: Path, header: Header) -> None:
    """Damaged where a file that the header tells of is missing, or shorter than it was."""
    for name, size in ((header.arrays, header.arrays_size), (TENSORS, header.tensors_size)):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            found = 0
        if found < size:
            raise Damaged(f"{folder / name} is shorter than it was")


def _parts(folder: Path) -> tuple[Header, bytes]:
    """The same, of the right types but not proven to be signed."""
    if not is_own(folder):
        raise Damaged(f"{folder} is not of this user alone")
    try:
        first, _, rest = (folder / CHECKPOINT).read_bytes().partition(b"\n")
        header = msgspec.json.decode(first, type=Header)
        if _line(header) != first:  # what is signed is what `sealed` writes of the fields
            raise ValueError("another spelling")
        return header, rest
    except Exception as error:  # of bytes that anything may have written; RecursionError among them
        raise Damaged(f"{folder} has no whole checkpoint") from error


def _signed(header: Header, content: bytes) -> bytes:
    """What the signature is over."""
    return _line(replace(header, signature="")) + b"\n" + content


def _line(header: Header) -> bytes:
    return json.dumps(asdict(header)).encode()
