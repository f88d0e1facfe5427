"""The folder itself: made beside its place, and moved there when all of it is right."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files import publish
from qcompile.compiler.files.load import check_model_file, check_output_path, load_model, save_model
from qcompile.compiler.package.beside import GENAI, Beside
from qcompile.compiler.package.genai import genai_config
from qcompile.passes.errors import UserError
from qcompile.runtime.library import DOMAIN, check_version, library_path
from qcompile.runtime.sessions import session

MODEL, LICENCES, TOKENIZER = "model.onnx", "LICENSES.txt", "tokenizer_config.json"


@dataclass(frozen=True)
class Packaged:
    """Files written, the model first; lacking: why the graph's own operators have no native kernels there, or ""."""

    files: tuple[Path, ...]
    lacking: str


@dataclass(frozen=True)
class Contents:
    """What goes beside the graph: files that are copied, and texts by name."""

    copied: tuple[Path, ...]
    texts: Mapping[str, str]
    lacking: str

    @property
    def names(self) -> list[str]:
        """Of all of them, the configuration last: what is there without it is not yet a package."""
        return sorted((*(path.name for path in self.copied), *self.texts), key=lambda name: name == GENAI)

    def write(self, folder: Path) -> list[Path]:
        """Write all into a folder."""
        for path in self.copied:
            shutil.copyfile(path, folder / path.name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in self.names]


def package(
    source: Path | str, folder: Path | str, *, tokenizer: Path | None = None, kernels: str = "auto"
) -> Packaged:
    """--for genai: write what it runs of a decoder into `folder`: graph, weights, configuration, tokenizer, kernels.

    source: a compiled model or a float one; it may be model.onnx of `folder` itself, and stays as it is then.
    tokenizer: the folder with tokenizer.json and config.json, where they do not lie beside the model.
    kernels: "portable" leaves the native kernels out, "native" makes their absence an error.
    UserError for what genai cannot run; nothing is written then.
    """
    source, target = Path(source), Path(folder).absolute() / MODEL
    check_model_file(source)
    model = load_model(source)
    with about(source):
        contents = genai_contents(model, source, target.parent, tokenizer, kernels)
    inside = target.exists() and target.samefile(source)
    if not inside:
        check_replaced(target, target.parent)
    for name in [*contents.names, *([] if inside else [MODEL])]:
        check_output_path(source, target.with_name(name), contents.copied)
    with publish.staging(target) as staged, publish.writing(target):
        others = contents.write(staged.parent)
        if inside:
            for path in others:
                publish.replace_file(path, target.with_name(path.name))
            files: tuple[Path, ...] = (target,)
        else:
            written = save_model(model, staged).paths
            session(staged, kernels="portable" if contents.lacking else "auto")
            files = publish.publish(written, target, others)
    return Packaged((*files, *(target.with_name(path.name) for path in others)), contents.lacking)


def check_package(source: Path | str, folder: Path | str, tokenizer: Path | None = None) -> None:
    """Raise UserError where `package` would refuse what is compiled of a source: said before the work."""
    source = Path(source)
    check_model_file(source)
    model = load_model(source)
    with about(source):
        contents = genai_contents(model, source, Path(folder), tokenizer, "auto")
    for name in contents.names:
        check_output_path(source, Path(folder) / name, contents.copied)


def check_replaced(target: Path, folder: Path) -> None:
    """Raise UserError where a model in a folder is none that was packaged there."""
    if target.exists() and not (folder / LICENCES).exists():
        raise UserError(f"{target} is no earlier package, and would be replaced: choose another folder with -o")


@contextmanager
def about(source: Path) -> Iterator[None]:
    """Errors about a model with its file in front, unless they name another."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def genai_contents(model: ir.Model, source: Path, folder: Path, tokenizer: Path | None, kernels: str) -> Contents:
    plan = input_plan(model)
    plan.require_decoder()
    beside = Beside.of(tokenizer or source)
    library, lacking = _library(model, source, kernels)
    config = genai_config(model, plan, beside, library.name if library else None)
    beside.tokenizer.check_vocabulary(plan.vocabulary)
    texts = {GENAI: json.dumps(config, indent=2) + "\n", LICENCES: licences(beside, library)}
    if not (beside.folder / TOKENIZER).is_file():  # genai asks for the file, whatever it says
        texts[TOKENIZER] = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    there = folder.is_dir() and folder.samefile(beside.folder)
    copied = ([] if there else beside.files) + ([library] if library else [])
    return Contents(tuple(copied), texts, lacking)


def _library(model: ir.Model, source: Path, kernels: str) -> tuple[Path | None, str]:
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


def licences(beside: Beside, library: Path | None) -> str:
    """What is in the folder, and under whose terms."""
    own = ", ".join(path.name for path in beside.licences)
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
