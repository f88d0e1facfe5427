"""Finished combinations of a sweep on disk, by a digest of everything that decides their figures."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qcompile.compiler.files import publish
from qcompile.passes.errors import UserError


class Cache:
    """A folder with one JSON file for each finished combination; a file is there complete or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The figures kept under a key; None where there are none that can be read."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a combination."""
        write_atomically(self._path(key), json.dumps(figures, indent=1) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def digest(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def files_digest(files: Iterable[Path | str]) -> str:
    """The sha256 of the files' contents, in order; UserError for one that cannot be read."""
    total = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); a sweep takes files only") from error
    return total.hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a killed process leaves the old one or the new one, never a part."""
    with publish.writing(path), publish.staging(path) as part:
        with open(part, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            publish.settle(file)
        os.replace(part, path)
