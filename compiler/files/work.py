"""A hidden folder beside an output, `.NAME.….work.tmp`: tensors of a model as they are made, and how far it has come.

Invariants, whoever is killed when:
1. The file `checkpoint` is one that was finished, or there is none; what it names was on the disk before it. A longer
   file of tensors than it says is what came after it.
2. A folder belongs to the process that holds its lock. One whose process is gone is taken over by a compile that finds
   its own key there, once; it is the last one's: who makes a folder removes the others that nobody holds, and who
   has published its output does. Whether somebody holds one is asked under the output's lock alone, and a folder is
   let go after its checkpoint is gone or to stay: two processes never work in one, and none removes another's.
3. It is made when something is put there: a compile of seconds makes none.
4. It can be read by its owner alone, and a checkpoint is trusted (`snapshot`) only with its signature (`secret`) over
   every byte of `checkpoint`; a folder is taken over only with that. Whatever stands there instead is Damaged and
   nothing else. The files of tensors and arrays hold numbers, and are known by their sizes alone. Where there are no
   locks, no modes or no secret, there are no checkpoints.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import onnx_ir as ir

from qcompile.compiler.files import locks, publish, secret
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


class Work:
    """The folder of one compile, from its first tensor to its end; see the module for what holds of it.

    kept: the header of the last checkpoint that is there, its own or one that it went on from.
    """

    def __init__(self, output: Path, *, fresh: bool = False) -> None:
        self.output, self._fresh = output.absolute(), fresh
        self.folder: Path | None = None
        self.kept: Header | None = None
        self._stack, self._held = contextlib.ExitStack(), False
        self._tensors: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> "Work":
        if self._fresh:
            self._remove_others()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close(remove=error is None or self.kept is None)
        if error is None:
            with contextlib.suppress(UserError):  # the next one removes them
                self._remove_others()
        elif self.kept is not None:
            error.add_note(_told(error, self.kept))

    @property
    def tensors(self) -> Path:
        """The file of tensors."""
        return self._made() / _TENSORS

    @property
    def room(self) -> int | None:
        """Bytes free on the output's disk, with those of unfinished compiles of it, which are gone on from or removed;
        None where nobody tells.
        """
        folder = self.output.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            with self._free() as folders:
                left = sum(file.stat().st_size for own in folders for file in own.iterdir())
            return shutil.disk_usage(folder).free + left
        except OSError:
            return None

    @property
    def waiting(self) -> bool:
        """Whether an unfinished compile of this output lies there, with a checkpoint, whole or not."""
        with self._free() as folders:
            return any(map(_has_checkpoint, folders))

    def adopted(self, key: str) -> bool:
        """Whether there was a folder of a compile that decides the same; it is this one's now, up to its checkpoint.

        Damaged where there was none, and a checkpoint of no matter what that is not whole.
        """
        damaged = None
        with self._free() as folders:
            for folder in filter(_has_checkpoint, folders):
                try:
                    header, _ = _proven(folder)
                except Damaged as error:
                    damaged = error
                    continue
                if header.key == key:
                    self._hold(folder)
                    self.kept, self._end = header, header.tensors_size
                    return True
        if damaged is not None:
            raise damaged
        return False

    @property
    def unkept(self) -> str:
        """Why a checkpoint that is put here would not be found or trusted; empty where it would."""
        folder = self._made()
        if not self._held:
            return f"there are no locks in {self.output.parent}"
        if not _is_own(folder):
            return f"others can write whatever is in {self.output.parent}"
        if secret.signature(b"") is None:
            return "the folder of caches keeps no secret that signs checkpoints (QCOMPILE_CACHE gives another folder)"
        return ""

    def content(self) -> tuple[bytes, BinaryIO]:
        """What the checkpoint says, and its file of arrays; Damaged where something is missing."""
        folder = self._made()
        header, found = _proven(folder)
        for name, size in ((header.arrays, header.arrays_size), (_TENSORS, header.tensors_size)):
            if (folder / name).stat().st_size < size if (folder / name).exists() else size:
                raise Damaged(f"{folder / name} is shorter than it was")
        return found, open(folder / header.arrays, "rb")  # it is read as long as the walk goes on

    def drop(self) -> None:
        """Remove the folder, and begin without."""
        self._close(remove=True)
        self.folder = self.kept = self._tensors = None
        self._stack, self._held, self._end = contextlib.ExitStack(), False, 0

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """The tensor, its bytes behind the others in the file of tensors; UserError, of an OSError, where the disk does
        not take it: those before it stay.
        """
        path = self.tensors
        with publish.writing(self.output):
            if self._tensors is None:
                self._tensors = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  # until the end
                self._tensors.truncate(self._end)
            start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            try:
                self._tensors.seek(start)
                for chunk in chunks(tensor):
                    self._tensors.write(chunk)
                self._tensors.flush()
            except OSError:
                self._cut(path)
                raise
            self._end = start + tensor.nbytes
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(path, start, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")

    def _cut(self, path: Path) -> None:
        """Let go of what found no room, in buffers and on the disk, so that the output has it."""
        assert self._tensors is not None
        with contextlib.suppress(OSError):
            self._tensors.close()
        self._tensors = None
        with contextlib.suppress(OSError):
            os.truncate(path, self._end)

    @contextlib.contextmanager
    def arrays(self, done: int) -> Iterator[BinaryIO]:
        """The file of arrays of the checkpoint behind so many segments, to be written; gone where that fails."""
        path = self._made() / f"{_ARRAYS}-{done}"
        with _whole(path), open(path, "wb") as file:
            yield file
            publish.settle(file)

    def keep(self, key: str, done: int, of: int, seconds: float, content: bytes) -> None:
        """Make this the checkpoint, in one step; `arrays` of as many segments is written."""
        folder, name = self._made(), f"{_ARRAYS}-{done}"
        part = folder / f"{_CHECKPOINT}.part"
        with _whole(part), _whole(folder / name):
            if self._tensors is not None:
                publish.settle(self._tensors)
            size = (folder / name).stat().st_size
            header = Header(key, done, of, seconds, name, size, self._end)
            header = replace(header, signature=secret.signature(_signed(header, content)) or "")
            with open(part, "wb") as file:
                file.write(_line(header) + b"\n")
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
                    self._hold(Path(made))
            self._remove_others()
        assert self.folder is not None
        return self.folder

    def _hold(self, folder: Path) -> None:
        """Make a free folder this one's; under the output's lock."""
        self._held = self._stack.enter_context(locks.alive(folder / _ALIVE))
        self.folder = folder

    def _close(self, *, remove: bool) -> None:
        """Let the folder go. To be removed: its checkpoint first, so that nobody takes it over meanwhile."""
        if self._tensors is not None:
            self._tensors.close()
        if self.folder is not None and remove:
            _remove(self.folder)
        self._stack.close()
        if self.folder is not None and remove:
            _remove(self.folder)  # Windows: the lock file was open

    def _there(self) -> list[Path]:
        """All folders of this output, but for this one's. Between the names stands what mkdtemp makes."""
        name = re.compile(rf"\.{re.escape(self.output.name)}\.[a-z0-9_]{{8}}{re.escape(_END)}")
        with contextlib.suppress(OSError):
            return [f for f in self.output.parent.iterdir() if name.fullmatch(f.name) and f != self.folder]
        return []

    @contextlib.contextmanager
    def _free(self) -> Iterator[list[Path]]:
        """Under the output's lock: its folders that no process holds, the last one first."""
        if not self._there():
            yield []
            return
        with contextlib.ExitStack() as stack:
            with publish.writing(self.output):
                stack.enter_context(locks.exclusive(publish.lock(self.output)))
            free = [folder for folder in self._there() if _is_mine(folder) and locks.is_free(folder / _ALIVE)]
            yield sorted(free, key=_changed, reverse=True)

    def _remove_others(self) -> None:
        with self._free() as folders:
            for folder in folders:
                _remove(folder)


def forget(output: Path) -> None:
    """Remove what unfinished compiles of that output left."""
    with Work(output, fresh=True):
        pass


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / _CHECKPOINT).unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Remove the file if what is inside fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


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


def _is_mine(folder: Path) -> bool:
    """Whether a folder is one that this user made."""
    try:
        told = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(told.st_mode) and (not hasattr(os, "getuid") or told.st_uid == os.getuid())


def _is_own(folder: Path) -> bool:
    """Whether a folder is one that this user made, and nobody else reads or writes in."""
    with contextlib.suppress(OSError):
        return _is_mine(folder) and not (hasattr(os, "getuid") and folder.lstat().st_mode & 0o077)
    return False


def _has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint lies there that nobody else can have written since."""
    return _is_own(folder) and (folder / _CHECKPOINT).is_file()


def _proven(folder: Path) -> tuple[Header, bytes]:
    """The header of a folder's checkpoint and what follows it, as this user signed them; else Damaged."""
    header, found = _parts(folder)
    if not secret.is_signed(_signed(header, found), header.signature):
        raise Damaged(f"{folder / _CHECKPOINT} is not whole, or is not of this user on this machine")
    return header, found


def _parts(folder: Path) -> tuple[Header, bytes]:
    """The same, of the right types but not proven to be signed."""
    if not _is_own(folder):
        raise Damaged(f"{folder} is not of this user alone")
    try:
        first, _, rest = (folder / _CHECKPOINT).read_bytes().partition(b"\n")
        header = msgspec.json.decode(first, type=Header)
        if _line(header) != first:  # what is signed is what `keep` writes of the fields
            raise ValueError("another spelling")
        return header, rest
    except Exception as error:  # of bytes that anything may have written; RecursionError among them
        raise Damaged(f"{folder} has no whole checkpoint") from error


def _signed(header: Header, content: bytes) -> bytes:
    """What the signature is over."""
    return _line(replace(header, signature="")) + b"\n" + content


def _line(header: Header) -> bytes:
    return json.dumps(asdict(header)).encode()
