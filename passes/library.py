"""Where the shared library of native kernels lies, and which one it is."""

import functools
import hashlib
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from qcompile.passes.errors import UserError

# A file that takes the place of the installed library: a developer's own build.
VARIABLE = "QCOMPILE_LIBRARY"
_NAME = "libqcompile_kernels.dylib" if sys.platform == "darwin" else "libqcompile_kernels.so"


def library_path() -> Path:
    """The library of native kernels, for RegisterCustomOpsLibrary; UserError if this installation has none."""
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UserError(f"{VARIABLE} names {named}, which is no file")
        return Path(named).absolute()
    for path in _candidates():
        if path.is_file():
            return path.absolute()
    raise UserError(
        "this installation has no library of native kernels (it was built without a C++ compiler): install g++, then "
        "reinstall qcompile-onnx. Without the library, models run through their portable bodies"
    )


def library_digest() -> str:
    """The sha256 of its content; empty where this installation has none. OSError where it cannot be read."""
    try:
        path = library_path()
    except UserError:
        return ""
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, written: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _candidates() -> Iterator[Path]:
    """In runtime/, as a wheel has it; or in the site-packages that hold an editable install of this checkout."""
    root = Path(__file__).resolve().parents[1]
    yield root / "runtime" / _NAME
    try:
        installed = distribution("qcompile-onnx")
    except PackageNotFoundError:
        return
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    folder = urllib.request.url2pathname(urllib.parse.urlsplit(origin.get("url", "")).path)
    if Path(folder).resolve() == root:
        yield Path(str(installed.locate_file(f"qcompile/runtime/{_NAME}")))
