"""What a change of numbers does to decisions: equal classes, and rows that flip from one class to another."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.labels import Labels
from qcompile.compiler.measure.paired import Paired, wilson

# What names of embeddings have in them.
_EMBEDDINGS = ("embed", "pool", "hidden", "feature")


@dataclass(frozen=True)
class ClassScores:
    """An output (rows, classes) against the reference's.

    top1: share of rows with an equal most likely class, top1_error: its standard error, top1_low, top1_high: its 95 %
    interval (Wilson's, rows taken as independent). top5: share of rows whose class is among the model's five most
    likely; None of fewer than six classes. flips: rows with another class. With labels, else None: reference, accuracy:
    share of rows that each gets right; lost, won: rows that one alone got right; accuracy_drop with its 95 % interval,
    and mcnemar_p, as in `Paired`.
    """

    rows: int
    top1: float
    top1_error: float
    top1_low: float
    top1_high: float
    top5: float | None
    flips: int
    reference: float | None = None
    accuracy: float | None = None
    lost: int | None = None
    won: int | None = None
    accuracy_drop: float | None = None
    accuracy_drop_low: float | None = None
    accuracy_drop_high: float | None = None
    mcnemar_p: float | None = None

    def told(self) -> str:
        """In a line."""
        parts = [f"top-1 {self.top1:.2%} ± {self.top1_error:.2%}"]
        parts += [f"top-5 {self.top5:.2%}"] if self.top5 is not None else []
        parts.append(f"{self.flips} of {self.rows} rows flip")
        if self.reference is not None and self.accuracy is not None:
            rows = f"{self.lost} rows wrong now, {self.won} right now, McNemar's p {self.mcnemar_p:.2g}"
            parts.append(f"accuracy {self.reference:.2%} → {self.accuracy:.2%} ({rows})")
        return ", ".join(parts)


@dataclass
class Classes:
    """Takes in batches of an output that scores classes: its most likely ones, row by row."""

    before: list[Labels] = field(default_factory=list)
    after: list[Labels] = field(default_factory=list)
    among: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    count: int = 0

    def add(self, reference: npt.NDArray[Any], output: npt.NDArray[Any]) -> None:
        """Two arrays (rows, classes, 1, …) of one shape."""
        a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, output))
        self.count = a.shape[1]
        first = a.argmax(axis=1)
        self.before.append(first)
        self.after.append(b.argmax(axis=1))
        best = np.argsort(-b, axis=1, kind="stable")[:, :5]
        self.among.append((best == first[:, None]).any(axis=1))

    def scores(self, labels: Labels | None = None) -> ClassScores | None:
        """Those of all rows; None without a row."""
        if not self.before:
            return None
        before, after = np.concatenate(self.before), np.concatenate(self.after)
        same, rows = before == after, len(before)
        share = float(same.mean())
        error = math.sqrt(share * (1 - share) / rows)
        top5 = float(np.concatenate(self.among).mean()) if self.count > 5 else None
        flips, low, high = int((~same).sum()), *wilson(share, rows)
        if labels is None:
            return ClassScores(rows, share, error, low, high, top5, flips)
        pair = asdict(Paired.of(before == labels, after == labels))
        pair.pop("count")
        return ClassScores(rows, share, error, low, high, top5, flips, **pair)


def scores_classes(name: str, array: npt.NDArray[Any]) -> bool:
    """Whether an output has a number for each class of each row: (rows, classes), or with axes of 1 after them.

    Embeddings have that shape, too, and are known by their names.
    """
    if any(word in name.lower() for word in _EMBEDDINGS):
        return False
    return array.ndim >= 2 and array.shape[1] > 1 and array.shape[2:] == (1,) * (array.ndim - 2) and array.size > 0
