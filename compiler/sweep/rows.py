"""The rows of a sweep: figures by combination, which of them are worth having, and how they are named."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.results.sheet import Sheet, Shown

_FIGURES = ("status", "reason", "bits_per_weight", "compiled_bytes", "coverage", "seconds", "pareto")
DONE, REFUSED, FAILED, SAME, OPEN = "done", "refused", "failed", "same", "open"


@dataclass
class Row:
    """A combination and what came of it.

    values: the grid's, by key. status: done; refused (bad settings, coverage or verification, with the reason);
    failed (anything else: tried again next time); same (as an earlier row); open (not run yet).
    bits_per_weight: of the products' quantized weights, scales and zero points included; None without any.
    compiled_bytes: of the model's files. coverage: share of the MatMul weights that were quantized. scores: by name,
    see sweep_metric. seconds: to compile and to score. pareto: no other row is better in both bits and error.
    """

    number: int
    values: Mapping[str, str]
    key: str = ""
    status: str = OPEN
    reason: str = ""
    bits_per_weight: float | None = None
    compiled_bytes: int = 0
    coverage: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    data: str = ""
    model: str = ""
    pareto: bool = False


@dataclass(repr=False)
class Sweep(Shown):
    """A sweep's rows and what they mean. keys: those of the grid. error: the score that is compared; axis: its name.

    source: the scored data in words. note: the user's own words for the caption. base: the recipe under the grid.
    """

    model: str
    model_hash: str
    base: dict[str, Any]
    versions: dict[str, str]
    error: str
    axis: str
    source: str
    note: str
    rows: list[Row]
    float_scores: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def done(self) -> list[Row]:
        """Rows with figures."""
        return [row for row in self.rows if row.status == DONE]

    @property
    def varying(self) -> list[str]:
        """Keys of the grid with more than one value; all keys where there is but one combination."""
        keys = list(self.rows[0].values)
        return [key for key in keys if len({row.values[key] for row in self.rows}) > 1] or keys

    def ordered(self) -> list[Row]:
        """Rows by bits per weight, then by error; those without figures behind, in the grid's order."""
        without = [row for row in self.rows if row.status != DONE]
        return sorted(self.done, key=lambda row: (row.bits_per_weight or 0.0, row.scores[self.error])) + without

    def to_dict(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)

    def records(self) -> list[dict[str, Any]]:
        """A row for each combination: its settings, scores and figures."""
        return [
            {**own.values, **own.scores, **{name: getattr(own, name) for name in _FIGURES}} for own in self.ordered()
        ]

    def sheet(self) -> Sheet:
        """The combinations with figures; * marks those that no other beats in both size and error."""
        heads = ("", *self.varying, "bits/weight", "size", self.error)
        rows = [
            [
                "*" if own.pareto else "",
                *(own.values[key] for key in self.varying),
                "" if own.bits_per_weight is None else f"{own.bits_per_weight:.3f}",
                megabytes(own.compiled_bytes),
                f"{own.scores[self.error]:.4g}",
            ]
            for own in self.ordered()
            if own.status == DONE
        ]
        left = [
            f"{name(own.values, self.varying)}: {own.status} {own.reason}" for own in self.rows if own.status != DONE
        ]
        return Sheet(f"{self.model}, {self.axis}; scored on {self.source}", heads, rows, 3, left)

    def mark_pareto(self) -> None:
        """Set `pareto` of every row."""
        points = [(row.bits_per_weight, row.scores[self.error]) for row in self.done if row.bits_per_weight]
        for row in self.rows:
            row.pareto = row.status == DONE and bool(row.bits_per_weight) and not _beaten(self._point(row), points)

    def _point(self, row: Row) -> tuple[float, float]:
        return row.bits_per_weight or 0.0, row.scores[self.error]


def _beaten(point: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Whether another point is nowhere worse and somewhere better; NaN never wins."""
    bits, error = point
    better = (b <= bits and e <= error and (b, e) != point for b, e in others)
    return error != error or any(better)


def name(values: Mapping[str, str], keys: Sequence[str]) -> str:
    """A combination in a few words: "int4 g32 symmetric smooth,pack"."""
    return " ".join(word(key, values[key]) for key in keys)


def word(key: str, value: str) -> str:
    """One setting in a word."""
    if key == "group_size":
        return value if value == "channel" else f"g{value}"
    if key == "symmetric":
        return "symmetric" if value == "yes" else "asymmetric"
    if key == "bits":
        return f"int{value}"
    return value if key in ("passes", "weights") else f"{key}={value}"
