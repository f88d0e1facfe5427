"""What a model was calibrated on is no test of it: files and texts are told apart by content, whatever their names."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.files.folders import report_path
from qcompile.models.text import calibration_text
from qcompile.passes.errors import UserError

# Texts in memory whose content is kept: whoever judges on the same ones meets these.
_MOST = 4096
# Characters of the passages that texts are compared by, and how many of them are looked for.
_PASSAGE, _PASSAGES = 100, 512


def digests(files: Iterable[Path], texts: Sequence[str] = ()) -> dict[str, str]:
    """By the sha256 of its content, the name of each file that can be read, and of texts in memory.

    A text is the same in a file and in memory: its content is its UTF-8. Of many texts the first `_MOST` count.
    """
    found: dict[str, str] = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                found.setdefault(hashlib.file_digest(stream, "sha256").hexdigest(), file.name)
        except OSError:  # whoever reads its data says so
            continue
    for number, text in enumerate(texts[:_MOST], 1):
        name = f"text {number}" if len(texts) > 1 else "the text"
        found.setdefault(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), name)
    return found


def bundled() -> dict[str, str]:
    """`digests` of the text that comes with qcompile."""
    return dict.fromkeys(digests([], [calibration_text()]), "the bundled text")


def check_apart(calibrated: Mapping[str, str], scored: Mapping[str, str], model: str = "") -> None:
    """Raise UserError where models are scored on what is calibrated on; both are `digests`."""
    for content, name in scored.items():
        if content in calibrated:
            own = "" if calibrated[content] == name else f" (as {calibrated[content]})"
            told = f"{model} was calibrated on it{own}" if model else f"it is calibrated on{own}, too"
            raise UserError(f"{name} is no test data: {told}; give data that calibration has not seen")


def calibrated_on(model: Path) -> dict[str, str]:
    """`digests` of what a compiled model was calibrated on, by the report beside it; empty without one."""
    try:
        plain = json.loads(report_path(model).read_text(encoding="utf-8"))
        found = plain.get("calibrated")
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}
    return {str(key): str(name) for key, name in found.items()} if isinstance(found, dict) else {}


def repeated_share(text: str, others: Iterable[str]) -> float:
    """The share of a text that is in others, whatever their white space: of its passages of `_PASSAGE` characters,
    `_PASSAGES` of them at most, spread evenly.
    """
    plain, known = " ".join(text.split()), [" ".join(other.split()) for other in others]
    count = max(len(plain) // _PASSAGE, 1)
    starts = range(0, count * _PASSAGE, math.ceil(count / _PASSAGES) * _PASSAGE)
    found = [any(plain[start : start + _PASSAGE] in other for other in known) for start in starts]
    return sum(found) / len(found)


def repeated_rows(scored: Iterable[Batch], others: Iterable[Batch]) -> int:
    """How many rows of batches are in other batches: equal numbers in all inputs. Batches without rows count as one."""
    known = {row for batch in others for row in _rows(batch)}
    return sum(row in known for batch in scored for row in _rows(batch))


def _rows(batch: Batch) -> Iterator[bytes]:
    """The sha256 of each row of a batch."""
    arrays = [np.asarray(array) for _, array in sorted(batch.feeds.items())]
    if any(array.shape[:1] != (batch.rows,) for array in arrays):
        arrays = [array[None] for array in arrays]
    for row in zip(*arrays, strict=True):
        total = hashlib.sha256()
        for array in map(np.asarray, row):  # an item of strings is no array
            total.update(f"{array.dtype} {array.shape} ".encode())
            total.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
        yield total.digest()
