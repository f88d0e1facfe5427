"""Arrays by input name, from files or from a program: read, checked against the inputs of a graph, converted."""

import contextlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.inputs import Input, InputPlan
from qcompile.compiler.facts.memory import available
from qcompile.passes.errors import UserError
from qcompile.passes.near import did_you_mean

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

_KINDS = {"i": "integer", "u": "integer", "f": "float", "V": "float", "b": "bool", "U": "string", "S": "string"}


def read_arrays(plan: InputPlan, paths: Sequence[Path]) -> Arrays:
    """The arrays of files that together fill the inputs, in the element types of the inputs.

    A .npz holds arrays by input name; a .npy is named after its input, or is for the only one that needs data.
    """
    return checked_all(plan, stored_arrays(plan, paths), " and ".join(map(str, paths[:2])))


def stored_arrays(plan: InputPlan, paths: Sequence[Path]) -> Arrays:
    """The arrays of files that together fill the inputs, as they are stored."""
    feeds: Arrays = {}
    for path in paths:
        feeds |= _load_npz(path) if path.suffix.lower() != ".npy" else {_input_of(plan, path): _load_npy(path)}
    return feeds


def checked_all(plan: InputPlan, arrays: Mapping[str, Any], source: str) -> Arrays:
    """The arrays in their inputs' element types; UserError for a name that is no input, and for one that misfits."""
    by_name = {given.name: given for given in plan.inputs}
    for name in arrays:
        if name not in by_name:
            hint = did_you_mean(name, by_name, f"inputs: {', '.join(by_name)}")
            raise UserError(f"{source}: array {name!r} is no input of the model ({hint})")
    given = plan.coded({name: np.asarray(array) for name, array in arrays.items()})
    return {name: checked(by_name[name], array, source) for name, array in given.items()}


def has_rows(plan: InputPlan, feeds: Mapping[str, Array]) -> bool:
    """Whether a batch holds a number at all, beside caches and what no node reads."""
    idle = plan.past_names | set(plan.fillers())
    arrays = [array for name, array in feeds.items() if array.ndim and name not in idle]
    return not arrays or any(array.size for array in arrays)


def check_rows(rows: bool, source: str) -> None:
    """UserError where no batch of a source has a row; one without rows among others is no harm."""
    if not rows:
        raise UserError(f"{source}: its arrays hold no rows: the leading dimension is 0")


def split(plan: InputPlan, feeds: Arrays) -> list[Arrays]:
    """The feeds as batches of the graph's fixed leading dimension; as they are where it is free."""
    parts = {
        len(feeds[i.name]) // i.shape[0]
        for i in plan.inputs
        if i.name in feeds and i.shape and isinstance(i.shape[0], int) and i.shape[0]
    }
    count = max(parts, default=1)
    if count == 1:
        return [feeds]
    if parts != {count} or any(len(array) % count for array in feeds.values() if array.ndim):
        lengths = ", ".join(f"{name}: {len(array)}" for name, array in feeds.items() if array.ndim)
        raise UserError(f"the arrays' leading dimensions do not agree ({lengths})")
    pieces = [np.split(array, count) if array.ndim else [array] * count for array in feeds.values()]
    return [dict(zip(feeds, part, strict=True)) for part in zip(*pieces, strict=True)]


def leading(feeds: Mapping[str, Array]) -> int:
    """The largest leading dimension, 1 for scalars alone."""
    return max((len(array) for array in feeds.values() if array.ndim), default=1)


def checked(given: Input, array: Array, source: str) -> Array:
    """The array in the input's element type; UserError where it is of another kind, or its shape does not fit.

    A wider type of the same kind (float64 for float32, int64 for int32) is converted, where its numbers allow it.
    """
    where = f"{source}: array {given.name!r}"
    if given.dtype.kind == "V" and array.dtype == np.dtype(f"V{given.dtype.itemsize}"):
        array = array.view(given.dtype)  # numpy's files forget the name of bfloat16 and its like
    _check_kind(given, array, where)
    _check_shape(given, array, where)
    if given.is_string:
        return np.array([_text(item) for item in array.ravel()], object).reshape(array.shape)
    if given.is_float and (np.isnan(array).any() or not (given.unbounded or np.isfinite(array).all())):
        raise UserError(f"{where} contains NaN or infinity")
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(given.dtype)).reshape(array.shape)
    lost = converted != array if given.dtype.kind in "iu" else ~np.isfinite(converted.astype("d")) & np.isfinite(array)
    if array.dtype != given.dtype and np.any(lost):
        raise UserError(f"{where} is {array.dtype} and holds numbers that {given.dtype}, the input's type, cannot")
    return converted


def conversions(plan: InputPlan, arrays: Mapping[str, Any]) -> list[str]:
    """What `checked` changes of the types of arrays, in words; widths of integers tell nothing and are left out."""
    types = {given.name: given.dtype for given in plan.inputs}
    pairs = ((name, np.asarray(array).dtype, types[name]) for name, array in arrays.items() if name in types)
    return [
        f"{name!r} converted from {own} to {wanted}"
        for name, own, wanted in pairs
        if own.kind == "f" and wanted.kind in "fV" and own.name != wanted.name
    ]


def _check_kind(given: Input, array: Array, where: str) -> None:
    if given.is_string:
        texts = array.dtype.kind in "US" or all(isinstance(item, str | bytes) for item in array.ravel())
        if not texts:
            raise UserError(f"{where} is {array.dtype}, the input takes strings")
        return
    wanted, got = (_KINDS.get(kind, kind) for kind in (given.dtype.kind, array.dtype.kind))
    if wanted != got or array.dtype.type is np.void:
        raise UserError(f"{where} is {array.dtype}, the input is {given.dtype}{_hint(given, array)}")


def _hint(given: Input, array: Array) -> str:
    if array.dtype.kind == "O":
        return " (arrays of Python objects, or rows of different lengths)"
    if given.is_float and array.dtype == np.uint8:
        return ": normalize it as the model was trained, or give the image files themselves"
    return f": convert it with .astype({given.dtype.name!r})" if array.dtype.kind in "iubf" else ""


def _check_shape(given: Input, array: Array, where: str) -> None:
    if not given.ranked:
        return
    first = given.shape[0] if given.shape else None
    several = isinstance(first, int) and array.ndim > 0 and len(array) > 0 and len(array) % max(first, 1) == 0
    fits = array.ndim == len(given.shape) and all(
        not isinstance(dim, int) or dim == size or (axis == 0 and several)
        for axis, (dim, size) in enumerate(zip(given.shape, array.shape, strict=True))
    )
    if not fits:
        wanted_shape = ", ".join("?" if dim is None else str(dim) for dim in given.shape)
        hint = "; array[None] adds the batch axis" if array.ndim == len(given.shape) - 1 else ""
        raise UserError(f"{where} has shape {list(array.shape)}, the input is [{wanted_shape}]{hint}")


def _text(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def _input_of(plan: InputPlan, path: Path) -> str:
    """The input that a .npy file is for, by its name, by that of its folder, or because there is no other."""
    names, needed = {given.name for given in plan.inputs}, plan.required
    if path.stem in names or (path.parent.name in names and len(needed) > 1):
        return path.stem if path.stem in names else path.parent.name
    if len(needed) != 1:
        own = ", ".join(f"{given.name}.npy" for given in needed) or "none"
        raise UserError(f"{path}: each of several inputs needs a file of its own name ({own}), or one .npz for all")
    return needed[0].name


def _load_npz(path: Path) -> Arrays:
    loaded = _load(path, "npz file")
    if isinstance(loaded, np.ndarray):
        raise UserError(f"{path} holds a single array: name it .npy, or save a .npz with arrays by input name")
    return dict(loaded)


def _load_npy(path: Path) -> Array:
    loaded = _load(path, "npy file")
    if not isinstance(loaded, np.ndarray):
        raise UserError(f"{path} holds several arrays: name it .npz")
    return loaded


def _load(path: Path, kind: str) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    _check_room(path)
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: np.asarray(loaded[name]) for name in loaded.files}
    except Exception as error:  # numpy raises ValueError, BadZipFile, zlib.error, ... on broken files
        raise UserError(f"{path} is not a readable .{kind}: {error}") from error


def _check_room(path: Path) -> None:
    """Raise UserError where the arrays of a .npz, unpacked, take more than the memory at hand: a MB can hold a GB."""
    free = available()
    if free is None or not zipfile.is_zipfile(path):
        return
    size = 0
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as packed:  # numpy tells what is wrong with it
        size = sum(member.file_size for member in packed.infolist())
    if size > free:
        raise UserError(
            f"{path} holds {size / 1e9:.1f} GB of arrays, {free / 1e9:.1f} GB of memory are free"
        ) from MemoryError()
