"""Data as programs have it: files, texts, arrays, and whatever gives batches of them."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt

from qcompile.compiler.api.models import PathLike
from qcompile.compiler.data import user_code
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import GENERAL, KINDS, Files
from qcompile.compiler.data.readers import Batches, Reader, dicts, document, documents, is_array, label_of, peeked, told
from qcompile.passes.errors import UserError

# One batch: arrays by input name, an array for a model with one input, or several in the order of the inputs.
Batch: TypeAlias = Mapping[str, Any] | npt.NDArray[Any] | Sequence[Any]
# Files and texts, one batch, or something that gives batches or texts: a list, a generator, a DataLoader, a reader.
Data: TypeAlias = Calibration | PathLike | Batch | Iterable[Any] | Reader
Transform = Callable[[Any], Any]


def data_of(
    given: Data | None, *, transform: Transform | None = None, tokenizer: PathLike | None = None
) -> Calibration:
    """Data in the form that every job takes.

    Case 1: nothing: the default data of a model. Case 2: a Calibration, as it is.
    Case 3: strings and paths: files, or texts (`_is_text`); one word as on the command line ("self", "module:name").
    Case 4: one batch: a dict by input name, or an array.
    Case 5: anything else gives batches, or texts (`readers.document`); each goes through `transform` first.
    """
    own = Path(tokenizer) if tokenizer is not None else None
    if transform is not None and not gives_items(given):
        raise UserError(
            "transform= is for calibration data that gives batches, such as a DataLoader; leave it out here"
        )
    if given is None:  # Case 1
        return Calibration(tokenizer=own)
    if isinstance(given, Calibration):  # Case 2
        return replace(given, tokenizer=own) if own is not None else given
    if _is_words(given):  # Case 3
        return _words(_listed(given), own)
    if isinstance(given, Mapping) or (is_array(given) and not _is_column(given)):  # Case 4
        given = [given]
    label = "the calibration data" if isinstance(given, (list, tuple)) else type(given).__name__
    return _given(given, label, transform, own)  # Case 5


def twice(calibration: Calibration) -> Calibration:
    """Data that can be read again: what a program's reader gives is kept in memory."""
    reference = Files.of(calibration.paths).reference
    source = reference or calibration.reader
    if source is None:
        return calibration
    label = label_of(source)
    with told(label):
        given = user_code.found(reference, "--calibration") if reference else source
        items = [deepcopy(item) for item in dicts(given)]
    return replace(calibration, files=(), reader=Batches(label, items))


def gives_items(given: Data | None) -> bool:
    """Whether it is data whose items a transform may see: neither files, texts, nor settings."""
    return given is not None and not isinstance(given, Calibration) and not _is_words(given)


def _given(given: Any, label: str, transform: Transform | None, tokenizer: Path | None) -> Calibration:
    """What gives batches, or texts: the first item tells which."""
    with told(label):
        items = map(transform, dicts(given)) if transform is not None else dicts(given)
    first, every = peeked(items, label)
    if document(first) is not None:
        return Calibration(tokenizer=tokenizer, texts=tuple(documents(every, label)))
    return Calibration(tokenizer=tokenizer, reader=Batches(label, every))


def _words(words: Sequence[PathLike], tokenizer: Path | None) -> Calibration:
    texts = [word for word in words if _is_text(word)]
    if not texts:
        return Calibration([os.fspath(word) for word in words], tokenizer)
    files = [word for word in words if not isinstance(word, str) or os.path.exists(word)]
    if files:
        raise UserError(f"calibration has both files ({os.fspath(files[0])}) and texts: give one kind")
    general = [GENERAL] if GENERAL in words else []
    return Calibration(general, tokenizer, texts=tuple(str(word) for word in words if word not in general))


def _listed(given: Any) -> list[PathLike]:
    return [given] if isinstance(given, (str, os.PathLike)) else list(given)


def _is_words(given: Any) -> bool:
    """Strings or paths, one or several; an empty list is data without a batch."""
    if isinstance(given, (str, os.PathLike)):
        return True
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(w, (str, os.PathLike)) for w in given)


def _is_column(given: Any) -> bool:
    """Whether something is a column of texts, as pandas and its like have them; numpy's arrays are batches."""
    first = next(iter(given), None) if type(given).__module__.partition(".")[0] in ("pandas", "polars") else None
    return isinstance(first, str)


def _is_text(word: PathLike) -> bool:
    """Whether a string is a text, no file's name: it has spaces, and there is no such file, nor the ending of one."""
    if not isinstance(word, str) or not any(map(str.isspace, word.strip())) or os.path.exists(word):
        return False
    return "\n" in word or os.path.splitext(word)[1].lower() not in KINDS
