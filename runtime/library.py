"""The shared library of native kernels: where it lies, and which version of the operators it computes.

Applications in any language hand its path to ONNX Runtime (docs/deploy.md). Nothing here loads the library.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from qcompile.passes.errors import UserError

# A file that takes the place of the installed library: a developer's own build.
VARIABLE = "QCOMPILE_LIBRARY"
_NAME = {"win32": "qcompile_kernels.dll", "darwin": "libqcompile_kernels.dylib"}.get(
    sys.platform, "libqcompile_kernels.so"
)


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
        "reinstall qcompile-onnx. Without it, models run through their portable bodies"
    )


def _candidates() -> list[Path]:
    """Beside this file, as a wheel has it; or where the installation of this very checkout put it (editable)."""
    here = Path(__file__).resolve().parent
    paths = [here / _NAME]
    try:
        installed = distribution("qcompile-onnx")
    except PackageNotFoundError:
        return paths
    origin = installed.read_text("direct_url.json") or ""
    if here.parent.as_uri() in origin:
        paths.append(Path(str(installed.locate_file(f"qcompile/runtime/{_NAME}"))))
    return paths
