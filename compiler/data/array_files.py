"""Which files of arrays belong together: a .npz alone, .npy files named after inputs, or one by one."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qcompile.compiler.data.inputs import InputPlan

ARRAYS = (".npz", ".npy")


def array_sets(plan: InputPlan, paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Files that together fill the inputs once, in the order given.

    Case 1: a .npz holds all arrays.
    Case 2: .npy files named after inputs, in one folder, are one set.
    Case 3: folders named after inputs, beside each other: the i-th file of each, by name, are a set.
    Case 4: any other .npy is a set of its own, for the only input that needs data.
    """
    names = {given.name for given in plan.inputs}
    sets: dict[object, list[Path]] = {}
    turn: dict[Path, int] = {}
    for path in map(Path, paths):
        key: object = path
        if path.suffix.lower() == ".npy" and path.stem in names:
            key = path.parent
        elif path.suffix.lower() == ".npy" and path.parent.name in names and len(plan.required) > 1:
            turn[path.parent] = turn.get(path.parent, -1) + 1
            key = path.parent.parent, turn[path.parent]
        sets.setdefault(key, []).append(path)
    return [tuple(found) for found in sets.values()]


def in_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of these kinds in a folder and the folders in it, numbers in names in their order."""
    found = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    wanted = [path for path in found if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(wanted, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]
