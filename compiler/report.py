"""What was done: coverage, sizes, errors; as JSON and as a table on the terminal."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from qcompile.compiler.census import Family, family_of
from qcompile.compiler.console import table
from qcompile.compiler.mixed import Mixed
from qcompile.compiler.predictions import Predictions
from qcompile.compiler.rungs import Ladder
from qcompile.compiler.verify import NodeError, OutputError
from qcompile.passes.base import Decision

# Families of weights that coverage is about: of MatMul and whatever multiplies like it, and of convolutions.
PRODUCTS: tuple[Family, ...] = ("MatMul", "Conv")


@dataclass(frozen=True)
class ActivationRange:
    """What was observed of an activation value on the calibration data, and the range [low, high] chosen for its codes.

    counts: how many numbers fell between edges[i] and edges[i + 1], len(edges) = len(counts) + 1; both empty where
    the observer keeps no histogram. Raises ValueError where the two do not fit.
    """

    value: str
    low: float
    high: float
    observed_low: float
    observed_high: float
    observer: str
    counts: tuple[int, ...] = ()
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.counts and len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.edges)} edges for {len(self.counts)} counts of {self.value}")


@dataclass(frozen=True)
class RowsSeen:
    """Rows of activations that statistics were taken of, (fewest, most) over the activations.

    seen: in all. held: of those, rows that no choice was fitted to until it was judged on them.
    """

    seen: tuple[int, int]
    held: tuple[int, int]

    def __str__(self) -> str:
        seen, held = (f"{low}" if low == high else f"{low} to {high}" for low, high in (self.seen, self.held))
        return f"{seen} rows an activation, {held} of them held aside to judge choices on"

    def joined(self, other: "RowsSeen | None") -> "RowsSeen":
        """Both together."""
        if other is None:
            return self
        pairs = ((self.seen, other.seen), (self.held, other.held))
        seen, held = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs)
        return RowsSeen(seen, held)


@dataclass
class Report:
    """Everything a compile leaves behind beside the model.

    decisions: by pass, in order. quantizers: passes that say which weights became codes; the decisions of the first
    one account for every float constant of 1,024 elements or more (`coverage`). mixed: what stays in float by its
    sensitivity, where the recipe wants that. ladder: what each step without data gained, where there was no data.
    predictions: of a decoder, on real tokens. rounding: what integer nodes changed in the outputs at most, relative.
    rows: of the activations that passes fitted to, the fewest and the most rows that one was seen on, and how many of
    them were held aside for judging. trials: what samples held aside said of a pass behind the walk.
    sizes in bytes, seconds, peak_memory in bytes.
    """

    source: str
    source_hash: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    data: str = ""
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    quantizers: tuple[str, ...] = ("pack", "qdq", "dynamic")
    nodes: list[NodeError] = field(default_factory=list)
    outputs: list[OutputError] = field(default_factory=list)
    ranges: list[ActivationRange] = field(default_factory=list)
    mixed: Mixed | None = None
    ladder: Ladder | None = None
    predictions: Predictions | None = None
    rounding: float = 0.0
    rows: RowsSeen | None = None
    trials: list[str] = field(default_factory=list)
    reload_error: float | None = None
    files: list[str] = field(default_factory=list)
    source_bytes: int = 0
    compiled_bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def quantizer(self) -> str | None:
        """The pass that made codes of weights; the one of several that has the decisions."""
        return next((name for name in self.quantizers if name in self.decisions), None)

    @property
    def quantizing(self) -> list[Decision]:
        """What was decided on weights, by all passes that make codes."""
        return [d for name in self.quantizers for d in self.decisions.get(name, [])]

    def packed(self, kind: str) -> list[Decision]:
        """Decisions that quantized a node of the kind (MatMul, Conv, Gather, …)."""
        return [d for d in self.quantizing if d.action == "quantized" and d.detail.get("kind") == kind]

    def skipped(self, kind: str) -> list[Decision]:
        """Decisions that left a node of the kind in float, for want of a format."""
        return [d for d in self.quantizing if d.action == "skipped" and d.detail.get("kind") == kind]

    @property
    def skipped_products(self) -> list[Decision]:
        """The same for all products, of MatMul-like weights and of convolutions."""
        return [d for family in PRODUCTS for d in self._of(family, "skipped")]

    def elements(self, family: Family, action: str) -> int:
        """Elements of the family's weights of which that was decided ("quantized", "skipped", "kept"), each once."""
        return _elements(self._of(family, action))

    def _of(self, family: Family, action: str) -> list[Decision]:
        chosen = (d for d in self.quantizing if d.action == action)
        return [d for d in chosen if d.detail.get("family", family_of(str(d.detail.get("kind", "")))) == family]

    def share(self, *families: Family) -> float | None:
        """Share of the families' weights (elements, each weight once) that were quantized; None where there are none.

        Weights that the user chose to keep in float ("kept") do not count; all others in float do ("skipped").
        """
        done = sum(self.elements(family, "quantized") for family in families)
        left = sum(self.elements(family, "skipped") for family in families)
        return done / (done + left) if done + left else None

    @property
    def kinds(self) -> str:
        """The families of products that the model has weights of, in words."""
        return " and ".join(family for family in PRODUCTS if self.share(family) is not None) or "MatMul"

    @property
    def coverage(self) -> float:
        """Share of all products' weights that were quantized, 1.0 where there are none."""
        share = self.share(*PRODUCTS)
        return 1.0 if share is None else share

    @property
    def told(self) -> str:
        """The coverage in a line: of each family by itself. 100.0 % is all of it, to the last weight."""
        shares = [(family, self.share(family)) for family in PRODUCTS]
        parts = [f"{percent(share)} of the {family} weights" for family, share in shares if share is not None]
        if not parts:
            return "there was no weight of a product to quantize"
        return f"{parts[0]} quantized{''.join(f', {part}' for part in parts[1:])}"

    @property
    def bits_per_weight(self) -> float | None:
        """Average stored bits of the products' quantized weights, scales and zero points included."""
        done = [d for family in PRODUCTS for d in self._of(family, "quantized")]
        weights = [d for d in _unique(done) if d.detail.get("weights") and "bits_per_weight" in d.detail]
        total = sum(d.detail["weights"] for d in weights)
        return sum(d.detail["bits_per_weight"] * d.detail["weights"] for d in weights) / total if total else None

    def to_json(self) -> str:
        """The whole report, in strict JSON: a number that is NaN or infinite is null."""
        plain = asdict(self)
        plain["coverage"], plain["bits_per_weight"] = self.coverage, self.bits_per_weight
        plain["shares"] = {family: self.share(family) for family in PRODUCTS}
        return json.dumps(_strict(plain), indent=1, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, what JSON has no type for in words, null for NaN and inf."""
    if isinstance(value, dict):
        return {str(key): _strict(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(own) for own in value]
    if isinstance(value, np.generic | np.ndarray):
        return _strict(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) or value is None else str(value)


def _unique(decisions: Sequence[Decision]) -> list[Decision]:
    return list({d.detail.get("weight", d.node): d for d in decisions}.values())


def percent(share: float) -> str:
    """A share in tenths of a percent, never more than it is: 100.0 % is all."""
    return f"{int(1000 * share) / 10:.1f}%"


def _elements(decisions: Sequence[Decision]) -> int:
    return sum(int(d.detail.get("weights", 0)) for d in _unique(decisions))


def print_report(report: Report, console: Console) -> None:
    """The coverage table, the errors worth knowing, the sizes."""
    if report.quantizer is not None:
        _print_coverage(report, console)
    _print_passes(report, console)
    for told in (report.mixed, report.ladder):
        for line in told.lines() if told is not None else ():
            console.print(line, soft_wrap=True)
    _print_errors(report, console)
    saved = f"{_mb(report.source_bytes)} → {_mb(report.compiled_bytes)}"
    bits = f", {report.bits_per_weight:.2f} bits per packed MatMul weight" if report.bits_per_weight else ""
    console.print(f"size      {saved}{bits}")
    console.print(f"took      {report.seconds:.0f} s, peak memory {report.peak_memory / 1e9:.2f} GB")


def _print_coverage(report: Report, console: Console) -> None:
    console.print(f"coverage  {report.told}")
    made = table("nodes", "operator", "decision", "weights", "MB", numbers=2)
    rows: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    for d in report.quantizing:
        key = (str(d.detail.get("kind", "")), d.group)
        rows[key] += 1
        name = str(d.detail.get("weight", d.node))
        if name not in seen:
            weights[key] += int(d.detail.get("weights", 0))
            size[key] += int(d.detail.get("bytes", 4 * int(d.detail.get("weights", 0))))
            seen.add(name)
    for key in rows:
        amount = f"{weights[key] / 1e6:.2f} M" if weights[key] >= 10_000 else f"{weights[key] or ''}"
        megabytes = f"{size[key] / 1e6:.1f}" if weights[key] else "shared" if key[1].startswith("int") else ""
        made.add_row(str(rows[key]), key[0], key[1], amount, megabytes)
    if rows:
        console.print(made)


def _print_passes(report: Report, console: Console) -> None:
    for name, decisions in report.decisions.items():
        if name in report.quantizers or not decisions:
            continue
        actions = Counter(d.action for d in decisions)
        told = ", ".join(f"{count} {action}" for action, count in actions.items())
        console.print(f"{name:<9} {told}")


def _print_errors(report: Report, console: Console) -> None:
    console.print(f"data      {report.data}")
    if report.rows is not None:
        console.print(f"rows      {report.rows}")
    for trial in report.trials:
        console.print(f"trial     {trial}", soft_wrap=True)
    if report.nodes:
        worst = sorted(report.nodes, key=lambda n: -n.error)
        middle = worst[len(worst) // 2]
        console.print(
            f"nodes     relative error: median {middle.error:.3f}, worst {worst[0].error:.3f} ({worst[0].node})"
        )
    _print_activations(report, console)
    for output in report.outputs[:4]:
        console.print(f"output    {output.name}: relative error {output.relative:.3g}, cosine {output.cosine:.5f}")
    if report.predictions is not None:
        console.print(f"accuracy  {report.predictions.told()}", soft_wrap=True)
    if report.reload_error is not None:
        console.print(f"reloaded  the saved file reproduces the verified outputs to {report.reload_error:.1e}")


def _print_activations(report: Report, console: Console) -> None:
    """How many packed products take int8 activations in a kernel, and what that adds to their error."""
    measured = [node for node in report.nodes if node.int8_error is not None]
    int8 = [node for node in report.nodes if node.activation_bits == 8]
    if not measured and not int8:
        return
    console.print(
        f"activations  {len(int8)} nodes int8, {len(report.nodes) - len(int8)} nodes 16 bit{_added(report, int8)}"
    )


def _added(report: Report, int8: Sequence[NodeError]) -> str:
    """The squared error of int8 activations over that of all weights, and the largest error of one node."""
    errors, whole = [node.int8_error for node in int8], sum(node.error**2 for node in report.nodes)
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return ""
    share = (
        f"{sum(error**2 for error in known) / whole:.2%} of the squared weight error" if whole else "all of the error"
    )
    return f" (int8 adds {share}; at most {max(known):.4f} in a node)"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
