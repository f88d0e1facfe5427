"""Calibration batches from a program: readers with `get_next`, functions, and anything that gives dicts of arrays."""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcompile.compiler.data.feeds import Batch, completed, kept
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import check_rows, checked_all, conversions, has_rows, leading, split
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.passes.errors import UserError

# What gives more batches gives them for ever: a run over so many would take a day.
_MOST = 100_000


class Reader(Protocol):
    """What ONNX Runtime's tools call a CalibrationDataReader."""

    def get_next(self) -> Mapping[str, Any] | None:
        """The next batch by input name; None behind the last."""
        ...


def is_reference(word: str) -> bool:
    """Whether a word names something in a module, module:name, rather than a file."""
    return ":" in word and not Path(word).exists()


def read_batches(plan: InputPlan, source: Any, label: str) -> tuple[list[Batch], list[str]]:
    """(batches, remarks) of what a reader, a function or an iterable gives, each put aside at once.

    source: itself, or module:name. Whatever the user's program raises, SystemExit included, is told in one line.
    """
    spill, batches = Spill(), list[Batch]()
    remarks: dict[str, None] = {}
    rows = False
    try:
        given = found(source) if isinstance(source, str) else source
        for arrays in dicts(given):
            if not isinstance(arrays, Mapping):
                alone = ": put it in a list" if isinstance(given, Mapping) else ""
                raise UserError(f"{label} gave {type(arrays).__name__}, not a dict from input name to array{alone}")
            if len(batches) >= _MOST:
                raise UserError(f"{label} gave {_MOST} batches and does not end: return None behind the last one")
            # Copies: a function may fill the same array again.
            own = {str(name): np.array(array) for name, array in arrays.items()}
            remarks |= dict.fromkeys(conversions(plan, own))
            feeds = completed(plan, checked_all(plan, own, f"a batch of {label}"), f"a batch of {label}")
            rows = rows or has_rows(plan, feeds)
            batches += [Batch(kept(spill, part), leading(part)) for part in split(plan, feeds)]
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except SystemExit as error:
        raise UserError(f"--calibration {label} ended the program by itself: sys.exit({error.code!r})") from error
    except BaseException as error:  # native code brings exceptions of its own that are no Exception
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"--calibration {label} failed: {type(error).__name__}: {detail}") from error
    if not batches:
        raise UserError(f"{label} gave no batches")
    check_rows(rows, label)
    return batches, list(remarks)


def found(reference: str) -> Any:
    """What module:name names; the current folder is searched first."""
    module, _, name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look in the current folder by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--calibration {reference}: {' '.join(str(error).split())}") from error


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
