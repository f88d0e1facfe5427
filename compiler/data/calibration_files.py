"""The words behind --calibration sorted by what they are: texts, arrays, images, or something in a module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.compiler.data import images
from qcompile.compiler.data.array_files import ARRAYS, in_folder
from qcompile.compiler.data.readers import is_reference
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

# Words for --calibration without files; and one that may stand among files of text: the text that comes with qcompile.
SELF, NORMS = "self", "norms"
GENERAL = "general"

_TEXTS = (".txt", ".jsonl")
KINDS = (*ARRAYS, *images.SUFFIXES, *_TEXTS)


@dataclass(frozen=True)
class Files:
    """Files of one kind, folders replaced by what lies in them. reference: module:name, or ""."""

    texts: Sequence[Path] = ()
    arrays: Sequence[Path] = ()
    images: Sequence[Path] = ()
    reference: str = ""

    @classmethod
    def of(cls, words: Sequence[str]) -> "Files":
        """The words sorted; UserError for a mixture, for a folder without any such file, and for what is no file."""
        if "" in words:
            raise UserError("--calibration was given an empty name: is a variable unset?")
        references = [word for word in words if is_reference(word)]
        paths = [path for word in words if word not in references for path in _expanded(Path(word))]
        for path in paths:
            _check_regular(path)
        arrays = [path for path in paths if path.suffix.lower() in ARRAYS]
        pictures = [path for path in paths if path.suffix.lower() in images.SUFFIXES]
        texts = [path for path in paths if path not in arrays and path not in pictures]
        if sum(map(bool, (arrays, references, texts, pictures))) > 1 or len(references) > 1:
            raise UserError(
                "--calibration takes text files, files of arrays (.npz, .npy), images or one module:function, "
                "not a mixture"
            )
        return cls(texts, arrays, pictures, references[0] if references else "")


def named(words: Sequence[str]) -> list[Path]:
    """The files that words name, those in folders among them, as far as there are any: what the work will read."""
    paths = [Path(word) for word in words if word]
    return [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # reading a pipe may wait for ever
        raise UserError(f"{path} is not a regular file: save the data in one")
    if not path.exists() and str(path) in (SELF, NORMS):
        raise UserError(
            f"{path} is a word for --calibration, and stands alone there: leave it out, or what is beside it"
        )
    if not path.exists() and path.suffix.lower() not in KINDS:
        raise UserError(f"{path}: no such file or folder{near(str(path), (GENERAL, SELF, NORMS))}")


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if found := _inside(path):
        return found
    raise UserError(f"{path}: no .npz, .npy, image, .txt or .jsonl file in this folder")


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder. Texts beside arrays or images tell about them (README.txt, labels.txt): no data."""
    found = in_folder(folder, KINDS)
    return [file for file in found if file.suffix.lower() not in _TEXTS] or found
