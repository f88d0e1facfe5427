"""The folder itself: made beside its place, and moved there when all of it is right."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompile.compiler.files import publish
from qcompile.compiler.files.folders import report_path
from qcompile.compiler.files.load import check_output_path, data_files, save_model
from qcompile.compiler.package.beside import GENAI, table
from qcompile.compiler.package.written import check_replaced, digest, known, note
from qcompile.passes.errors import UserError
from qcompile.passes.formats.half_scales import halve
from qcompile.passes.library import library_path
from qcompile.runtime.library import DOMAIN, check_version
from qcompile.runtime.sessions import session

MODEL = "model.onnx"


@dataclass(frozen=True)
class Packaged:
    """Files written, the model first; lacking: why the graph's own operators have no native kernels there, or ""."""

    files: tuple[Path, ...]
    lacking: str


@dataclass(frozen=True)
class Contents:
    """What goes beside the graph: files that are copied, and texts by name.

    derived: names of texts that are made of the file that lies in their place, and say all that it says.
    """

    copied: tuple[Path, ...]
    texts: Mapping[str, str]
    lacking: str
    derived: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Of all of them, the configuration last: what is there without it is not yet a package."""
        return sorted((*(path.name for path in self.copied), *self.texts), key=lambda name: name == GENAI)

    @property
    def digests(self) -> dict[str, str]:
        """Of the contents, by name."""
        return {path.name: digest(path) for path in self.copied} | {n: digest(own) for n, own in self.texts.items()}

    def check(self, folder: Path) -> None:
        """Raise UserError for a file in the folder that would be replaced, and is of no earlier package."""
        check_replaced(folder, {name: own for name, own in self.digests.items() if name not in self.derived})

    def write(self, folder: Path) -> list[Path]:
        """Write all into a folder."""
        for path in self.copied:
            shutil.copyfile(path, folder / path.name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in self.names]


def write_folder(model: ir.Model, source: Path, target: Path, contents: Contents, *, within: int = 0) -> Packaged:
    """Write a model to `target`, and what goes beside it; a model that is there already stays as it is.

    within: weights of at most so many bytes are written into the model file.
    """
    inside, folder = target.exists() and target.samefile(source), target.parent
    if not inside:
        check_model(target)
    contents.check(folder)
    for name in [*contents.names, *([] if inside else [target.name])]:
        check_output_path(source, target.with_name(name), contents.copied)
    with publish.staging(target) as staged, publish.writing(target):
        others, written, before = contents.write(staged.parent), contents.digests, known(folder)
        if inside:
            if digest(target) not in before.get(target.name, ()):  # a compile has written it since
                before.pop(target.name, None)
            note(folder, written, before)
            for path in others:
                publish.replace_file(path, target.with_name(path.name))
            files: tuple[Path, ...] = (target, *sorted(data_files(target)))
        else:
            halve(model)
            saved = save_model(model, staged)
            saved_files = _in_one(saved.paths) if saved.data_bytes <= within else saved.paths
            session(staged, kernels="portable" if contents.lacking else "auto")
            written |= {target.name: digest(staged)}
            note(folder, written, before)
            files = publish.publish(saved_files, target, others)
        sums = note(folder, written, {name: own for name, own in before.items() if name not in written})
    return Packaged((*files, *(target.with_name(path.name) for path in others), sums), contents.lacking)


def _in_one(paths: Sequence[Path]) -> Sequence[Path]:
    """A saved model and its data as one file."""
    model, *data = paths
    content = onnx.load(model).SerializeToString(deterministic=True)
    with open(model, "wb") as file:
        file.write(content)
        publish.settle(file)
    for path in data:
        path.unlink()
    return (model,)


def check_model(target: Path, name: str = "") -> None:
    """Raise UserError where a model would be replaced that was not packaged there.

    name: in the package, where the model does not lie at its top.
    """
    check_replaced(target.parents[name.count("/")], {name or target.name: None})


def check_compiled(target: Path) -> None:
    """The same before a compile, which replaces what another one wrote, and the report that tells of it with it."""
    told = table(report_path(target)).get("files", ())
    if not isinstance(told, list) or target.name not in told:
        check_model(target)


@contextmanager
def about(source: Path) -> Iterator[None]:
    """Errors about a model with its file in front, unless they name another."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def native_library(model: ir.Model, source: Path, kernels: str) -> tuple[Path | None, str]:
    """The native kernels that the graph has use for, or why it goes without them."""
    if all(node.domain != DOMAIN for node in model.graph.all_nodes()):
        return None, ""
    if kernels == "portable":
        return None, "left out by --kernels portable"
    try:
        library = library_path()
    except UserError as error:
        if kernels == "native":
            raise
        return None, str(error)
    check_version(source, library)
    return library, ""


def licences(found: Sequence[Path], library: Path | None) -> str:
    """What is in the folder, and under whose terms: those of the model's licence files, and ours."""
    own = ", ".join(path.name for path in found)
    told = f"see {own}" if own else "no licence lay beside the model; see where it came from"
    text = f"Model, weights, tokenizer and their configuration: {told}.\n"
    if library is not None:
        text += f"{library.name}: native kernels of qcompile, Apache License 2.0:\n\n{_apache()}"
    return text


def _apache() -> str:
    try:
        return distribution("qcompile-onnx").read_text("licenses/LICENSE") or ""
    except PackageNotFoundError:
        return ""
