"""Calibration batches from a program: readers with `get_next`, functions, and anything that gives batches of arrays."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data import user_code
from qcompile.compiler.data.feeds import Batch, completed, kept
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import check_rows, checked_all, conversions, has_rows, leading, split
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.passes.errors import UserError

# What gives more batches gives them for ever: a run over so many would take a day.
_MOST = 100_000
_NOTHING = object()


class Reader(Protocol):
    """What ONNX Runtime's tools call a CalibrationDataReader."""

    def get_next(self) -> Mapping[str, Any] | None:
        """The next batch by input name; None behind the last."""
        ...


@dataclass(frozen=True)
class Batches:
    """A program's batches, under the name that messages give them."""

    label: str
    items: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def is_reference(word: str) -> bool:
    """Whether a word names something in a module, module:name, rather than a file."""
    return ":" in word and not Path(word).exists()


def label_of(source: Any) -> str:
    """What messages call a program's data: module:name as it is, a label that it has, else what kind of thing it is."""
    return source if isinstance(source, str) else str(getattr(source, "label", type(source).__name__))


def read_batches(plan: InputPlan, source: Any, label: str) -> tuple[list[Batch], list[str]]:
    """(batches, remarks) of what a reader, a function or an iterable gives, each put aside at once.

    source: itself, or module:name.
    """
    spill, batches = Spill(), list[Batch]()
    remarks: dict[str, None] = {}
    rows = False
    with told(label):
        given = user_code.found(source, "--calibration") if isinstance(source, str) else source
        for item in dicts(given):
            alone = ": put it in a list" if isinstance(given, Mapping) else ""
            if len(batches) >= _MOST:
                raise UserError(f"{label} gave {_MOST} batches and does not end: return None behind the last one")
            own = by_name(plan, item, label, alone)
            remarks |= dict.fromkeys(conversions(plan, own))
            feeds = completed(plan, checked_all(plan, own, f"a batch of {label}"), f"a batch of {label}")
            rows = rows or has_rows(plan, feeds)
            batches += [Batch(kept(spill, part), leading(part)) for part in split(plan, feeds)]
    if not batches:
        raise UserError(f"{label} gave no batches")
    check_rows(rows, label)
    return batches, list(remarks)


def told(label: str) -> AbstractContextManager[None]:
    """Whatever the user's program raises inside is told in one line (`user_code.told`)."""
    return user_code.told(f"--calibration {label}" if ":" in label else label)


def by_name(plan: InputPlan, item: Any, label: str, hint: str = "") -> dict[str, npt.NDArray[Any]]:
    """The arrays of one batch by input name, copied: a program may fill the same array again.

    Case 1: by name already. Case 2: a tuple or list of arrays: those of the inputs that need data, in order.
    Case 3: one array, or rows of numbers, for a model with one such input.
    A batch whose arrays all lack the first axis, as a data set gives samples, is one row.
    """
    needed = plan.required
    if isinstance(item, Mapping):  # Case 1
        own = {str(name): array_of(value) for name, value in item.items()}
    elif isinstance(item, str | bytes) or item is None:
        raise UserError(f"{label} gave {type(item).__name__}, not a dict from input name to array{hint}")
    elif isinstance(item, tuple | list) and any(is_array(part) for part in item):  # Case 2
        if len(item) != len(needed):
            names = ", ".join(given.name for given in needed) or "none"
            raise UserError(
                f"a batch of {label} has {len(item)} parts, the model needs {len(needed)} ({names}): pick them with "
                "transform=, as in transform=lambda batch: batch[0]"
            )
        own = {given.name: array_of(part) for given, part in zip(needed, item, strict=True)}
    elif len(needed) == 1:  # Case 3
        own = {needed[0].name: array_of(item)}
    else:
        names = ", ".join(given.name for given in needed) or "none"
        raise UserError(f"{label} gave {type(item).__name__}, not a dict from input name to array (needed: {names})")
    lacking = [_lacks_rows(plan, name, array) for name, array in own.items()]
    return {name: array[None] for name, array in own.items()} if lacking and all(lacking) else own


def _lacks_rows(plan: InputPlan, name: str, array: npt.NDArray[Any]) -> bool:
    """Whether an array is its input's but for the first axis, which may be 1."""
    shape = next((given.shape for given in plan.inputs if given.name == name and given.ranked), ())
    return len(shape) == array.ndim + 1 and (shape[0] == 1 or not isinstance(shape[0], int))


def array_of(value: Any) -> npt.NDArray[Any]:
    """A copy of an array, a tensor of torch wherever it lies, or rows of numbers."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # numpy has none, and float32 holds all of its numbers
            value = value.float()
    return np.array(value)


def is_array(value: Any) -> bool:
    """Whether something is an array, of whatever library."""
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def peeked(items: Iterable[Any], label: str) -> tuple[Any, Iterator[Any]]:
    """(the first item, all items); UserError where there is none."""
    rest = iter(items)
    with told(label):
        first = next(rest, _NOTHING)
    if first is _NOTHING:
        raise UserError(f"{label} gave no batches")
    return first, chain([first], rest)


def documents(items: Iterator[Any], label: str) -> list[str]:
    """The texts that a program gives; UserError where one is none, or where they do not end."""
    with told(label):
        found = list(islice(items, _MOST + 1))
    wrong = next((item for item in found if document(item) is None), None)
    if wrong is not None:
        raise UserError(f"{label} gave {type(wrong).__name__} among texts: give texts alone")
    if len(found) > _MOST:
        raise UserError(f"{label} gave {_MOST} texts and does not end")
    return [text for item in found if (text := document(item)) is not None]


def document(item: Any) -> str | None:
    """The text that an item is: a string, or the field "text" of a row, as .jsonl files have them; None for others."""
    text = item.get("text") if isinstance(item, Mapping) else item
    return text if isinstance(text, str) else None


def dicts(given: Any) -> Iterator[Any]:
    """The batches of a source.

    Case 1: an object with get_next, as ONNX Runtime's CalibrationDataReader: until it gives None, or ends as iterators
    do. One that has been read to its end is rewound first, where it can be.
    Case 2: a class, or a function: called, then as in the other cases.
    Case 3: anything iterable.
    """
    if inspect.isclass(given) or (
        callable(given) and not hasattr(given, "get_next") and not hasattr(given, "__iter__")
    ):
        given = given()
    if not hasattr(given, "get_next"):
        yield from given
        return
    batch = given.get_next()
    if batch is None and hasattr(given, "rewind"):
        given.rewind()
        batch = given.get_next()
    while batch is not None:
        yield batch
        try:
            batch = given.get_next()
        except StopIteration:  # of an iterator behind it
            return
