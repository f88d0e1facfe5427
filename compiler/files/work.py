"""A hidden folder beside an output, `.NAME.….work.tmp`: tensors of a model as they are made, and how far it has come.

Invariants, whoever is killed when:
1. The file `checkpoint` is one that was finished, or there is none; what it names was on the disk before it. A longer
   file of tensors than it says is what came after it.
2. A folder belongs to the process that holds its lock. One whose process is gone is taken over by a compile that finds
   its own key there, once; it is the last one's: who makes a folder removes the others that nobody holds, and who
   has published its output does.
3. It is made when something is put there: a compile of seconds makes none.
4. It can be read by its owner alone, and is read only where that is so: what lies there is trusted (`snapshot`).
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

from qcompile.compiler.files import locks, publish
from qcompile.passes.errors import UserError
from qcompile.passes.tensors import chunks

_END, _ALIVE = ".work.tmp", ".alive"
_TENSORS, _CHECKPOINT, _ARRAYS = "tensors", "checkpoint", "arrays"
# Tensors start on a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Header:
    """The first line of a checkpoint.

    key: of all that decides the result. done, of: finished segments, and all. seconds: worked until then.
    arrays: the name of the file of arrays. arrays_size, tensors_size: bytes of both files. size, digest: of what
    follows.
    """

    key: str
    done: int
    of: int
    seconds: float
    arrays: str
    arrays_size: int
    tensors_size: int
    size: int
    digest: str

    @property
    def next(self) -> str:
        """Where who takes it up goes on, in words."""
        return f"segment {self.done + 1} of {self.of}" if self.done < self.of else "the end of the segments"


class Damaged(Exception):
    """A checkpoint that is not whole."""


class Work:
    """The folder of one compile, from its first tensor to its end; see the module for what holds of it.

    kept: the header of the last checkpoint that is there, its own or one that it went on from.
    """

    def __init__(self, output: Path, *, fresh: bool = False) -> None:
        self.output, self._fresh = output.absolute(), fresh
        self.folder: Path | None = None
        self.kept: Header | None = None
        self._stack = contextlib.ExitStack()
        self._tensors: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> "Work":
        if self._fresh:
            self._remove_others()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()
        if self._tensors is not None:
            self._tensors.close()
        if self.folder is not None and (error is None or self.kept is None):
            shutil.rmtree(self.folder, ignore_errors=True)
        if error is None:
            self._remove_others()
        elif self.kept is not None:
            error.add_note(_told(error, self.kept))

    @property
    def tensors(self) -> Path:
        """The file of tensors."""
        return self._made() / _TENSORS

    @property
    def waiting(self) -> bool:
        """Whether an unfinished compile of this output lies there, with a checkpoint that its header can be read of."""
        return any(_readable(folder) for folder in self._others())

    def adopted(self, key: str) -> bool:
        """Whether there was a folder of a compile that decides the same; it is this one's now, up to its checkpoint."""
        for folder in self._others():
            try:
                header, _ = _parts(folder)
            except Damaged:
                continue
            if header.key == key and self._take(folder):
                self.kept, self._end = header, header.tensors_size
                return True
        return False

    def content(self) -> tuple[bytes, BinaryIO]:
        """What the checkpoint says, and its file of arrays; Damaged where something is missing."""
        folder = self._made()
        header, found = _parts(folder)
        if len(found) != header.size or hashlib.sha256(found).hexdigest() != header.digest:
            raise Damaged(f"{folder / _CHECKPOINT} is not whole")
        for name, size in ((header.arrays, header.arrays_size), (_TENSORS, header.tensors_size)):
            if (folder / name).stat().st_size < size if (folder / name).exists() else size:
                raise Damaged(f"{folder / name} is shorter than it was")
        return found, open(folder / header.arrays, "rb")  # it is read as long as the walk goes on

    def drop(self) -> None:
        """Remove the folder, and begin without."""
        self._stack.close()
        if self._tensors is not None:
            self._tensors.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = self.kept = self._tensors = None
        self._stack, self._end = contextlib.ExitStack(), 0

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """The tensor, its bytes behind the others in the file of tensors; UserError where the disk does not take it."""
        path = self.tensors
        with publish.writing(self.output):
            if self._tensors is None:
                self._tensors = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  # until the end
                self._tensors.truncate(self._end)
            start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            self._tensors.seek(start)
            for chunk in chunks(tensor):
                self._tensors.write(chunk)
            self._tensors.flush()
            self._end = start + tensor.nbytes
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(path, start, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")

    @contextlib.contextmanager
    def arrays(self, done: int) -> Iterator[BinaryIO]:
        """The file of arrays of the checkpoint behind so many segments, to be written."""
        with open(self._made() / f"{_ARRAYS}-{done}", "wb") as file:
            yield file
            publish.settle(file)

    def keep(self, key: str, done: int, of: int, seconds: float, content: bytes) -> None:
        """Make this the checkpoint, in one step; `arrays` of as many segments is written."""
        folder, name = self._made(), f"{_ARRAYS}-{done}"
        if self._tensors is not None:
            publish.settle(self._tensors)
        size, digest = (folder / name).stat().st_size, hashlib.sha256(content).hexdigest()
        header = Header(key, done, of, seconds, name, size, self._end, len(content), digest)
        part = folder / f"{_CHECKPOINT}.part"
        with open(part, "wb") as file:
            file.write(json.dumps(asdict(header)).encode() + b"\n")
            file.write(content)
            publish.settle(file)
        os.replace(part, folder / _CHECKPOINT)
        self.kept = header
        for old in folder.glob(f"{_ARRAYS}-*"):
            if old.name != name:
                with contextlib.suppress(OSError):  # Windows: it is open
                    old.unlink()

    def _made(self) -> Path:
        if self.folder is None:
            with publish.writing(self.output):
                self.output.parent.mkdir(parents=True, exist_ok=True)
                with locks.exclusive(publish.lock(self.output)):
                    made = tempfile.mkdtemp(prefix=f".{self.output.name}.", suffix=_END, dir=self.output.parent)
                    self.folder = Path(made)
                    self._stack.enter_context(locks.alive(self.folder / _ALIVE))
            self._remove_others()
        return self.folder

    def _others(self) -> list[Path]:
        """Folders of this output that no process holds, the last one first."""
        found = self.output.parent.glob(f".{glob.escape(self.output.name)}.*{_END}")
        free = [f for f in found if f != self.folder and _is_own(f) and locks.is_free(f / _ALIVE)]
        return sorted(free, key=_changed, reverse=True)

    def _remove_others(self) -> None:
        if self._others():
            with locks.exclusive(publish.lock(self.output)):
                for folder in self._others():
                    shutil.rmtree(folder, ignore_errors=True)

    def _take(self, folder: Path) -> bool:
        with locks.exclusive(publish.lock(self.output)):
            if folder not in self._others():  # another process was faster
                return False
            self._stack.enter_context(locks.alive(folder / _ALIVE))
            self.folder = folder
        return True


def _told(error: BaseException, kept: Header) -> str:
    """How a compile goes on that leaves a checkpoint; one that was refused would be refused again as it is."""
    mended = isinstance(error, UserError)
    when = " once the cause is mended (or --min-cosine or --min-coverage loosened)" if mended else ""
    return f"what is finished is kept: the same command goes on at {kept.next}{when}; --fresh starts over"


def _changed(folder: Path) -> float:
    """When a folder was changed last; 0 where another process has removed it meanwhile."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _is_own(folder: Path) -> bool:
    """Whether a folder is one that this user made, and nobody else writes into."""
    try:
        told = folder.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or (told.st_uid == os.getuid() and not told.st_mode & 0o077)
    return folder.is_dir() and not folder.is_symlink() and mine


def _readable(folder: Path) -> bool:
    try:
        _parts(folder)
    except Damaged:
        return False
    return True


def _parts(folder: Path) -> tuple[Header, bytes]:
    """The header of a folder's checkpoint and what follows it."""
    try:
        first, _, rest = (folder / _CHECKPOINT).read_bytes().partition(b"\n")
        return Header(**json.loads(first)), rest
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{folder} has no whole checkpoint") from error
