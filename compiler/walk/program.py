"""What computes the bytes of a compile, beside its input: the programs, and the machine they run on."""

import hashlib
import inspect
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from threadpoolctl import threadpool_info

from qcompile.passes import extensions
from qcompile.passes.base import Pass
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_digest, library_path
from qcompile.passes.threads import workers
from qcompile.runtime.library import chosen_kernel

_OWN = ("compiler", "passes", "runtime", "models")
_CODE = (".py", ".so", ".pyd", ".dll", ".dylib")


class Unnamed(Exception):
    """A pass whose program has no file, as one that was typed into an interpreter."""


def machine() -> list[str]:
    """The processor as numeric libraries see it, by which they choose their loops, the threads, which cut sums, and the
    native kernels, by which activations go on (`Runner.advance`).

    OSError for kernels that cannot be read.
    """
    kinds = sorted({f"{own.get('internal_api')} {own.get('architecture')}" for own in threadpool_info()})
    return [platform.system(), platform.machine(), *kinds, f"{workers()} threads", *_kernels()]


def _kernels() -> list[str]:
    """The content of the library of native kernels, and the instruction set that it takes here."""
    try:
        return [library_digest(), chosen_kernel(library_path())]
    except UserError:
        return ["no native kernels"]


def digest_of(passes: Sequence[Pass]) -> str:
    """Of this program's own text, and all code of other packages that passes, formats or observers are from.

    Unnamed for a pass whose files cannot be found; OSError for one that cannot be read.
    """
    root, total = Path(__file__).resolve().parents[2], hashlib.sha256()
    files = {file for folder in _OWN for file in (root / folder).rglob("*.py")}
    added = (name for name in extensions.modules() if name in sys.modules)
    for file in sorted(files.union(*map(_files, [*added, *_foreign(passes)]))):
        total.update(str(file.name).encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _foreign(passes: Sequence[Pass]) -> Iterator[str]:
    """The outermost modules of passes' classes, and of those that they derive from, that are not of this program."""
    for own in passes:
        for kind in type(own).__mro__:
            top = kind.__module__.partition(".")[0]
            if top == "qcompile" or (top in sys.stdlib_module_names and top != "__main__"):
                continue
            try:
                inspect.getfile(kind)
            except (TypeError, OSError) as error:
                raise Unnamed(f"the program of pass {own.name} has no file") from error
            yield top


def _files(name: str) -> set[Path]:
    """All code of a package; of a module in no package also what is loaded from beside it, as its helpers are."""
    module = sys.modules[name]
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    found = {file for folder in folders for file in folder.rglob("*")}
    if not folders and getattr(module, "__file__", None):
        loaded = {Path(file) for own in [*sys.modules.values()] if (file := getattr(own, "__file__", None))}
        found = {file for file in loaded if file.parent == Path(str(module.__file__)).parent}
    return {file for file in found if file.suffix in _CODE and file.is_file()}
