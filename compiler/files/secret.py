"""A secret of this user, which signs what only programs that this user ran can have written.

Who owns a file and who may write it says nothing of who made it: unpacking an archive keeps its modes and gives the
files to the user.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

from qcompile.models.cache import cache_dir
from qcompile.passes.errors import UserError

# Each user of a shared folder of caches has a file there.
_NAME = f"checkpoints-{os.getuid()}.key" if hasattr(os, "getuid") else "checkpoints.key"
_BYTES = 32


def signature(content: bytes) -> str | None:
    """HMAC-SHA256 of the content in hexadecimal digits; None where a secret has no place that only its user reads."""
    key = _secret()
    return None if key is None else hmac.new(key, content, hashlib.sha256).hexdigest()


def is_signed(content: bytes, signed: str) -> bool:
    """Whether `signature` gave that for the content, for the same user; no string raises."""
    own = signature(content)
    return own is not None and hmac.compare_digest(own.encode(), signed.encode(errors="surrogatepass"))


def _secret() -> bytes | None:
    """The secret in the folder of caches, made when there is none."""
    try:
        path = cache_dir() / _NAME
        if not os.path.lexists(path):
            _make(path)
        return _read(path)
    except (OSError, UserError):
        return None


def _make(path: Path) -> None:
    """Write a new secret: whole or not at all, and never over another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{_NAME}-", dir=path.parent)  # 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(part, path)
    finally:
        os.unlink(part)


def _read(path: Path) -> bytes | None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        told = os.fstat(file.fileno())
        own = not hasattr(os, "getuid") or (told.st_uid == os.getuid() and not told.st_mode & 0o077)
        found = file.read(_BYTES + 1) if own and stat.S_ISREG(told.st_mode) else b""
    return found if len(found) == _BYTES else None
