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
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

from qcompile.compiler.files import finished, locks, publish, secret
from qcompile.compiler.files.header import (
    CHECKPOINT,
    TENSORS,
    Damaged,
    Header,
    check_sizes,
    has_checkpoint,
    is_mine,
    is_own,
    proven,
    sealed,
)
from qcompile.passes.errors import UserError
from qcompile.passes.tensors import chunks

_END, _ALIVE = ".work.tmp", ".alive"
_ARRAYS = "arrays"
# Tensors start on a cache line.
_ALIGNMENT = 64


class Work:
    """The folder of one compile, from its first tensor to its end; see the module for what holds of it.

    shelf: a folder that finished walks are taken from, and put into when the compile has succeeded.
    kept: the header of the last checkpoint that is there, its own or one that it went on from.
    taken: whether that is one of the shelf.
    """

    def __init__(self, output: Path, *, fresh: bool = False, shelf: Path | None = None) -> None:
        self.output, self._fresh, self.shelf = output.absolute(), fresh, shelf
        self.folder: Path | None = None
        self.kept: Header | None = None
        self.taken = False
        self._stack, self._held = contextlib.ExitStack(), False
        self._tensors: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> "Work":
        if self._fresh:
            self._remove_others()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None and self.shelf is not None and not self.taken:
            finished.put(self.folder, self.kept, self.shelf)
        self._close(remove=error is None or self.kept is None)
        if error is None:
            with contextlib.suppress(UserError):  # the next one removes them
                self._remove_others()
        elif self.kept is not None:
            error.add_note(_told(error, self.kept))

    @property
    def tensors(self) -> Path:
        """The file of tensors."""
        return self._made() / TENSORS

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
            return any(map(has_checkpoint, folders))

    def is_finished(self, key: str) -> bool:
        """Whether a walk of that key lies on the shelf."""
        return self.shelf is not None and not self._fresh and has_checkpoint(finished.place(self.shelf, key))

    def adopted(self, key: str) -> bool:
        """Whether there was a folder of a compile that walks the same; it is this one's now, up to its checkpoint.
        That of a walk on the shelf stays there.

        Damaged where there was none, and a checkpoint of no matter what that is not whole.
        """
        damaged = None
        if self.is_finished(key):
            assert self.shelf is not None
            try:
                header = finished.whole(self.shelf, key)
                finished.take(self.shelf, header, self._made())
                self.kept, self._end, self.taken = header, header.tensors_size, True
                return True
            except Damaged as error:
                damaged = error
        with self._free() as folders:
            for folder in filter(has_checkpoint, folders):
                try:
                    header, _ = proven(folder)
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
        if not is_own(folder):
            return f"others can write whatever is in {self.output.parent}"
        if secret.signature(b"") is None:
            return "the folder of caches keeps no secret that signs checkpoints (QCOMPILE_CACHE gives another folder)"
        return ""

    def content(self) -> tuple[bytes, BinaryIO]:
        """What the checkpoint says, and its file of arrays; Damaged where something is missing, or another process has
        replaced a walk on the shelf while its files were taken.
        """
        folder = self._made()
        header, found = proven(folder)
        if header != self.kept:
            raise Damaged(f"{folder / CHECKPOINT} is another one meanwhile")
        check_sizes(folder, header)
        return found, open(folder / header.arrays, "rb")  # it is read as long as the walk goes on

    def drop(self) -> None:
        """Remove the folder, and begin without."""
        self._close(remove=True)
        self.folder = self.kept = self._tensors = None
        self.taken = False
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
        part = folder / f"{CHECKPOINT}.part"
        with _whole(part), _whole(folder / name):
            if self._tensors is not None:
                publish.settle(self._tensors)
            size = (folder / name).stat().st_size
            header, whole = sealed(Header(key, done, of, seconds, name, size, self._end), content)
            with open(part, "wb") as file:
                file.write(whole)
                publish.settle(file)
            os.replace(part, folder / CHECKPOINT)
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
            free = [folder for folder in self._there() if is_mine(folder) and locks.is_free(folder / _ALIVE)]
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
        (folder / CHECKPOINT).unlink()
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
