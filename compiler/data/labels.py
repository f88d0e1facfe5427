"""Labels of evaluation data: one class number a row, in the rows' order, or by the names of image files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from qcompile.passes.errors import UserError

Labels = npt.NDArray[np.int64]
Parts = tuple[str, ...]
_FORMS = "a .npy or .npz file of integers, or lines that end in one (3, or picture.png 3)"


def read_labels(path: Path, names: Sequence[str] = ()) -> Labels:
    """The class numbers of all rows (N,). names: of the image files in the rows' order, for lines that have names.

    A line is of the image whose path ends in its name, or is how its name ends; of several, the longest counts.
    Raises UserError for what is no such file, and where a name fits several images or an image several names.
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
    if not names or not any(name for name, _ in pairs):
        return np.array([label for _, label in pairs], np.int64)
    return _by_name(path, [(_parts(name), label) for name, label in pairs if name], names)


def _by_name(path: Path, pairs: Sequence[tuple[Parts, int]], names: Sequence[str]) -> Labels:
    """The label of each image, by the ends of paths."""
    classes: dict[Parts, set[int]] = {}
    for parts, label in pairs:
        classes.setdefault(parts, set()).add(label)
    longer: dict[str, list[Parts]] = {}
    for parts in classes:
        longer.setdefault(parts[-1], []).append(parts)
    taken: dict[Parts, str] = {}
    labels = []
    for name in names:
        whole, own = _parts(os.path.abspath(name)), _parts(name)
        ends = (whole[start:] for start in range(len(whole)))
        found = next(([end] for end in ends if end in classes), None)
        found = found or [parts for parts in longer.get(own[-1], ()) if parts[-len(own) :] == own]
        if not found:
            raise UserError(f"--labels {path}: no label for {name}: a line has to name it, or the end of its path")
        if len(known := {label for parts in found for label in classes[parts]}) > 1:
            told = ", ".join(map(str, sorted(known)))
            raise UserError(f"--labels {path}: {name} has several labels ({told}): give names with their folders")
        first = taken.setdefault(found[0], os.path.abspath(name))
        if first != os.path.abspath(name):
            line = "/".join(found[0])
            raise UserError(f"--labels {path}: {line} may be {first} or {name}: give names with their folders")
        labels.append(known.pop())
    return np.array(labels, np.int64)


def _parts(name: str) -> Parts:
    """The folders and the name of a path, without its root."""
    pure = PurePosixPath(name.replace("\\", "/"))
    return tuple(part for part in pure.parts if part != pure.anchor) or (name,)


def _of_array(path: Path) -> Labels:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--labels {path}: cannot be read ({error}); it takes {_FORMS}") from error
    if array.ndim > 1 and array.size != len(array):
        told = "of one-hot rows save array.argmax(axis=1)"
        raise UserError(f"--labels {path}: holds {list(array.shape)}, and there is one class number a row: {told}")
    if array.dtype.kind not in "iu":
        raise UserError(f"--labels {path}: holds {array.dtype}, and class numbers are integers")
    labels = np.asarray(array, np.int64).reshape(-1)
    check_classes(labels, f"--labels {path}")
    return labels


def check_classes(labels: Labels, where: str) -> None:
    """Raise UserError for a class below 0: none is ignored."""
    if len(labels) and int(labels.min()) < 0:
        raise UserError(f"{where}: class {int(labels.min())}, and classes count from 0 on: leave such rows out")
