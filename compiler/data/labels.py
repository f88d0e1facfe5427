"""Labels of evaluation data: one class number a row, in the rows' order, or by the names of image files."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcompile.passes.errors import UserError

Labels = npt.NDArray[np.int64]
_FORMS = "a .npy or .npz file of integers, or lines that end in one (3, or picture.png 3)"


def read_labels(path: Path, names: Sequence[str] = ()) -> Labels:
    """The class numbers of all rows (N,). names: of the image files in the rows' order, for lines that have names.

    Raises UserError for what is no such file.
    """
    if path.suffix.lower() in (".npy", ".npz"):
        return _of_array(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path}: cannot be read as text ({error}); it takes {_FORMS}") from error
    found = [re.fullmatch(r"(?:(.*?)[\s,;:]+)?(\d+)", line) for line in lines]
    bad = next((line for line, match in zip(lines, found, strict=True) if match is None), None)
    if bad is not None or not lines:
        raise UserError(f"--labels {path}: {f'{bad!r} is no label' if bad else 'it is empty'}; it takes {_FORMS}")
    pairs = [(match[1], int(match[2])) for match in found if match is not None]
    by_name = {Path(name).name: label for name, label in pairs if name}
    if not by_name or not names:
        return np.array([label for _, label in pairs], np.int64)
    missing = next((name for name in names if Path(name).name not in by_name), None)
    if missing is not None:
        raise UserError(f"--labels {path}: no label for {Path(missing).name}")
    return np.array([by_name[Path(name).name] for name in names], np.int64)


def _of_array(path: Path) -> Labels:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--labels {path}: cannot be read ({error}); it takes {_FORMS}") from error
    if array.dtype.kind not in "iu":
        raise UserError(f"--labels {path}: holds {array.dtype}, and class numbers are integers")
    return np.asarray(array, np.int64).reshape(-1)
