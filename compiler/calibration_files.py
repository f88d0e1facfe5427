"""The words behind --calibration sorted by what they are: texts, arrays, images, or something in a module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.compiler import images
from qcompile.compiler.array_files import ARRAYS, in_folder
from qcompile.compiler.readers import is_reference
from qcompile.passes.errors import UserError

_TEXTS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Files:
    """Files of one kind, folders replaced by what lies in them. reference: module:name, or ""."""

    texts: Sequence[Path] = ()
    arrays: Sequence[Path] = ()
    images: Sequence[Path] = ()
    reference: str = ""

    @classmethod
    def of(cls, words: Sequence[str]) -> "Files":
        """The words sorted; UserError for a mixture, and for a folder without any such file."""
        references = [word for word in words if is_reference(word)]
        paths = [path for word in words if word not in references for path in _expanded(Path(word))]
        arrays = [path for path in paths if path.suffix.lower() in ARRAYS]
        pictures = [path for path in paths if path.suffix.lower() in images.SUFFIXES]
        texts = [path for path in paths if path not in arrays and path not in pictures]
        if sum(map(bool, (arrays, references, texts, pictures))) > 1 or len(references) > 1:
            raise UserError(
                "--calibration takes text files, files of arrays (.npz, .npy), images or one module:function, "
                "not a mixture"
            )
        return cls(texts, arrays, pictures, references[0] if references else "")


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = in_folder(path, (*ARRAYS, *images.SUFFIXES, *_TEXTS))
    if not found:
        raise UserError(f"{path}: no .npz, .npy, image, .txt or .jsonl file in this folder")
    return found
