"""Reading .npz files: arrays by input name, checked against the inputs of a graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.inputs import Input, InputPlan
from qcompile.passes.errors import UserError

Feeds = dict[str, npt.NDArray[Any]]


def read_npz(plan: InputPlan, path: Path) -> Feeds:
    """The arrays of a file in the element types of the inputs they are for; UserError where one does not fit."""
    arrays = _load(path)
    by_name = {given.name: given for given in plan.inputs}
    unknown = [name for name in arrays if name not in by_name]
    if unknown:
        raise UserError(f"{path}: array {unknown[0]!r} is no input of the model (inputs: {', '.join(by_name)})")
    return {name: checked(by_name[name], array, str(path)) for name, array in arrays.items()}


def split(plan: InputPlan, feeds: Feeds) -> list[Feeds]:
    """The feeds as batches of the graph's fixed leading dimension; as they are where it is free."""
    parts = {
        len(feeds[i.name]) // i.shape[0] for i in plan.inputs if i.shape and isinstance(i.shape[0], int) and i.shape[0]
    }
    count = max(parts, default=1)
    if count == 1:
        return [feeds]
    if parts != {count} or any(len(array) % count for array in feeds.values() if array.ndim):
        lengths = ", ".join(f"{name}: {len(array)}" for name, array in feeds.items() if array.ndim)
        raise UserError(f"the arrays' leading dimensions do not agree ({lengths})")
    return [
        dict(zip(feeds, part, strict=True)) for part in zip(*(np.split(a, count) for a in feeds.values()), strict=True)
    ]


def leading(feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    """The largest leading dimension, 1 for scalars alone."""
    return max((len(array) for array in feeds.values() if array.ndim), default=1)


def _load(path: Path) -> Feeds:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = {name: np.asarray(loaded[name]) for name in getattr(loaded, "files", ())}
    except Exception as error:  # numpy raises ValueError, BadZipFile, zlib.error, ... on broken files
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    if isinstance(loaded, np.ndarray):
        raise UserError(f"{path} holds a single array: save a .npz with arrays by input name")
    loaded.close()
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: array {name!r} contains NaN or infinity")
    return arrays


def checked(given: Input, array: npt.NDArray[Any], source: str) -> npt.NDArray[Any]:
    """The array in the input's element type; UserError where it is of another kind, or its shape does not fit."""
    where = f"{source}: array {given.name!r}"
    kinds = {"i": "integer", "u": "integer", "f": "float", "V": "float", "b": "bool"}
    wanted, got = kinds.get(given.dtype.kind, given.dtype.kind), kinds.get(array.dtype.kind, array.dtype.kind)
    if wanted != got:
        raise UserError(f"{where} is {array.dtype}, the input is {given.dtype}")
    first = given.shape[0] if given.shape else None
    several = isinstance(first, int) and array.ndim > 0 and len(array) > 0 and len(array) % max(first, 1) == 0
    fits = array.ndim == len(given.shape) and all(
        not isinstance(dim, int) or dim == size or (axis == 0 and several)
        for axis, (dim, size) in enumerate(zip(given.shape, array.shape, strict=True))
    )
    if not fits:
        wanted_shape = ", ".join("?" if dim is None else str(dim) for dim in given.shape)
        raise UserError(f"{where} has shape {list(array.shape)}, the input is [{wanted_shape}]")
    return np.ascontiguousarray(array.astype(given.dtype))
