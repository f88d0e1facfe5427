"""The folder where fetched and converted models are kept, and how entries get into it: complete or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import platformdirs

from qcompile.passes.errors import UserError


def cache_dir() -> Path:
    """QCOMPILE_CACHE, else the system's folder for caches (on Linux ~/.cache/qcompile); UserError without a home."""
    try:
        if chosen := os.environ.get("QCOMPILE_CACHE"):
            return Path(chosen).expanduser()
        if not os.environ.get("XDG_CACHE_HOME"):
            Path.home()  # platformdirs would go on without one
        return platformdirs.user_cache_path("qcompile", appauthor=False)
    except RuntimeError as error:  # a user of a container, whom no list of users knows
        raise UserError("the cache has no place, for this user has no home folder: set QCOMPILE_CACHE") from error


def entry(name: str, fill: Callable[[Path], None], *, complete: Iterable[str] = ()) -> Path:
    """The cached folder `name`, made by `fill` when it is missing or lacks one of the `complete` files.

    `fill` works in a folder of its own, which is renamed when it is done: two processes may do so at once,
    and a kill leaves no half entry.
    """
    target = cache_dir() / name
    wanted = list(complete)
    if _has(target, wanted):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"the cache {cache_dir()} cannot be written ({error.strerror}): set QCOMPILE_CACHE") from error
    try:
        fill(work)
        work.chmod(0o755)
        _publish(work, target, wanted)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def sha256(paths: Iterable[Path]) -> str:
    """The SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _has(target: Path, wanted: list[str]) -> bool:
    return target.is_dir() and all((target / name).is_file() for name in wanted)


def _publish(work: Path, target: Path, wanted: list[str]) -> None:
    if target.exists() and not _has(target, wanted):
        shutil.rmtree(target, ignore_errors=True)
    try:
        os.replace(work, target)
    except OSError as error:
        if not _has(target, wanted):  # otherwise another process was faster, with the same content
            raise UserError(f"{target} cannot be written ({error.strerror})") from error
