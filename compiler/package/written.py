"""What packages wrote into a folder: by name and sha256, so that nothing else there is ever replaced.

Invariant, of all that `qcompile package` and `--for` write: a file that is replaced has the content that an earlier
package gave it. (The compile of `--for` replaces a model that a compile wrote there, with its report, as every compile
does; `package` does not.) What a user put there, or has changed since, is named in an error before anything is written.
The record is SHA256SUMS, in the form that `sha256sum -c` reads. Data files whose names say their content are left out.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qcompile.compiler.files.publish import write_text
from qcompile.passes.errors import UserError

SUMS = "SHA256SUMS"
_HEAD = "# What qcompile package wrote here."
_UNRECORDED = f" (packages of earlier versions have no {SUMS}: remove the folder if it is one)"

Digests = Mapping[str, Collection[str]]


def digest(content: Path | str) -> str:
    """The sha256 of a file, or of a text as it is written."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    with open(content, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known(folder: Path) -> dict[str, set[str]]:
    """By name, the contents that packages gave the files of a folder; UserError for a SHA256SUMS of somebody else."""
    path, found = folder / SUMS, dict[str, set[str]]()
    if not os.path.lexists(path):
        return found
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    if lines[:1] != [_HEAD]:
        told = f"{path} is no record of an earlier package, and would be replaced"
        raise UserError(f"{told}: choose another folder with -o, or move it away")
    for line in lines[1:]:
        own, _, name = line.partition("  ")
        found.setdefault(name, set()).add(own)
    return found


def check_replaced(folder: Path, wanted: Mapping[str, str | None]) -> None:
    """Raise UserError for a file in the way that no earlier package wrote.

    wanted: by name, the digest of what is to lie there: a file of that content may stay. None: not known yet.
    """
    before = known(folder)
    for name, content in wanted.items():
        path = folder / name
        if not os.path.lexists(path):
            continue
        own = digest(path) if path.is_file() else ""
        if own != content and own not in before.get(name, ()):
            told = f"{path} is of no earlier package, or was changed since, and would be replaced"
            raise UserError(f"{told}: choose another folder with -o, or move it away{'' if before else _UNRECORDED}")


def note(folder: Path, written: Mapping[str, str], before: Digests | None = None) -> Path:
    """Write the record: of what is written now, and of what was `before` as far as it is still there.

    Called once before files are replaced, with what was known before, so that an interrupt in between leaves no file
    that nobody knows; and once behind it.
    """
    lines = sorted({*written.items(), *_kept(folder, before or {})})
    text = "".join(f"{own}  {name}\n" for name, own in lines)
    write_text(folder / SUMS, f"{_HEAD}\n{text}")
    return folder / SUMS


def _kept(folder: Path, before: Digests) -> Iterator[tuple[str, str]]:
    for name, contents in before.items():
        if os.path.lexists(folder / name):
            yield from ((name, own) for own in contents)
