"""Everything a compile leaves behind beside the model, as one record and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qcompile.compiler.console.document import strict
from qcompile.compiler.console.numbers import megabytes, percent
from qcompile.compiler.facts.census import Family, family_of
from qcompile.compiler.results.errors import ActivationRange, NodeError, OutputError, Predictions, RowsSeen, Speed
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.ladder import Ladder
from qcompile.compiler.results.mixed import Mixed
from qcompile.compiler.results.phases import Phase
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.passes.base import Decision
from qcompile.passes.prepare.folding import ALREADY

# Families of weights that coverage is about: of MatMul and whatever multiplies like it, and of convolutions.
PRODUCTS: tuple[Family, ...] = ("MatMul", "Conv")


@dataclass(repr=False)
class Report(Shown):
    """Everything a compile leaves behind beside the model; prints as a short table.

    decisions: by pass, in order. quantizers: passes that say which weights became codes; the decisions of the first
    one account for every float constant of 1,024 elements or more (`coverage`). mixed: what stays in float by its
    sensitivity, where the recipe wants that. ladder: what each step without data gained, where there was no data.
    calibrated: names of the files and texts that statistics came from, by the sha256 of their content.
    given: options of the command line that say where its data came from. budget, bound: by which `weights_of` was
    chosen; frontier: of all sizes.
    measured: what `outputs` and `predictions` were measured on. speed: where a paired run was asked for.
    warnings: what is odd about the calibration data. predictions: of a decoder, on real tokens.
    rounding: what integer nodes changed in the outputs at most, relative.
    rows: of the activations that passes fitted to, the fewest and the most rows that one was seen on, and how many of
    them were held aside for judging. trials: what samples held aside said of a pass behind the walk. caches: what
    storing them in codes changed, beside what all other passes did. target: of one whose runtime is not at hand, what
    settings it changed and what its rules say of the file.
    phases: where the time went. verified: what was compared with what.
    resumed: where the compile went on after an interrupt ("segment 7 of 61"); its seconds include those
    before, phases and peak_memory are those since. reused: the folder that the walk through all segments
    was taken from, where an earlier compile made it.
    output: the model file. asked: source and output as the user named them, where these are folders. files: names of
    all that was written beside it. sizes in bytes, seconds, peak_memory in bytes.
    """

    source: str
    source_hash: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    data: str = ""
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    quantizers: tuple[str, ...] = ()
    nodes: list[NodeError] = field(default_factory=list)
    outputs: list[OutputError] = field(default_factory=list)
    measured: str = ""
    calibrated: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    budget: str = ""
    bound: dict[str, float] = field(default_factory=dict)
    frontier: Frontier | None = None
    speed: Speed | None = None
    warnings: list[str] = field(default_factory=list)
    ranges: list[ActivationRange] = field(default_factory=list)
    mixed: Mixed | None = None
    ladder: Ladder | None = None
    predictions: Predictions | None = None
    rounding: float = 0.0
    rows: RowsSeen | None = None
    trials: list[str] = field(default_factory=list)
    caches: str = ""
    target: list[str] = field(default_factory=list)
    reload_error: float | None = None
    verified: str = ""
    resumed: str = ""
    reused: str = ""
    output: str = ""
    asked: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    source_bytes: int = 0
    compiled_bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    phases: list[Phase] = field(default_factory=list)

    @property
    def roundings(self) -> dict[int, str]:
        """What `activation_bits` are called: of MatMulNBits they are accuracy levels."""
        if self.recipe.get("target") == "matmulnbits":
            return {8: "level 4 (int8)", 16: "level 0 (float)"}
        return {8: "int8", 16: "16 bit"}

    @property
    def took(self) -> str:
        """Time and memory in words, and which runs they are of."""
        time, memory = f"{self.seconds:.0f} s", f"peak memory {self.peak_memory / 1e9:.2f} GB"
        if not self.resumed:
            return f"{time}, {memory}"
        where = f"it was interrupted, and went on at {self.resumed}"
        if self.reused:
            where = "the walk through the segments is an earlier compile's"
        return f"{time} in all, {memory}; {where}: memory and phases are those since"

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
            kept = any(self.elements(family, "kept") for family in PRODUCTS)
            left = "but those kept in float" if kept else "to quantize"
            return f"there was no weight of a product {left}{f': {self.coded}' if self.coded else ''}"
        return f"{parts[0]} quantized{''.join(f', {part}' for part in parts[1:])}"

    @property
    def coded(self) -> str:
        """That weights came as codes, in words; empty where none did."""
        count = sum(d.reason == ALREADY for own in self.decisions.values() for d in own)
        return f"its {count} weights are quantized already" if count else ""

    @property
    def bits_per_weight(self) -> float | None:
        """Average stored bits of the products' quantized weights, scales and zero points included."""
        done = [d for family in PRODUCTS for d in self._of(family, "quantized")]
        weights = [d for d in _unique(done) if d.detail.get("weights") and "bits_per_weight" in d.detail]
        total = sum(d.detail["weights"] for d in weights)
        return sum(d.detail["bits_per_weight"] * d.detail["weights"] for d in weights) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON has it: a number that is NaN or infinite is None."""
        plain = asdict(self)
        plain["coverage"], plain["bits_per_weight"] = self.coverage, self.bits_per_weight
        plain["shares"] = {family: self.share(family) for family in PRODUCTS}
        return dict(strict(plain))

    def to_json(self) -> str:
        """The same in strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """A row for each decision on a weight, with the errors of its node where they were measured."""
        errors = {error.node: error for error in self.nodes}
        rows = []
        for decision in self.quantizing:
            own = {"node": decision.node, "action": decision.action, "reason": decision.reason, **decision.detail}
            error = errors.get(decision.node)
            measured = {} if error is None else {k: v for k, v in asdict(error).items() if k not in ("node", "weights")}
            rows.append({str(key): value for key, value in strict(own | measured).items()})
        return rows

    def sheet(self) -> Sheet:
        """Nodes by what became of them, and how far from float the result is."""
        nodes: Counter[tuple[str, str]] = Counter()
        weights: Counter[tuple[str, str]] = Counter()
        for decision in self.quantizing:
            nodes[key := (str(decision.detail.get("kind", "")), decision.group)] += 1
            weights[key] += int(decision.detail.get("weights", 0))
        rows = [[str(nodes[key]), *key, f"{weights[key]:,}"] for key in nodes]
        bits = f", {self.bits_per_weight:.2f} bits per quantized weight" if self.bits_per_weight else ""
        title = f"{self.output or self.source}: {megabytes(self.source_bytes)} → {megabytes(self.compiled_bytes)}{bits}"
        return Sheet(title, ("nodes", "operator", "decision", "weights"), rows, 1, self._notes())

    def _notes(self) -> list[str]:
        notes = [f"coverage: {self.told}", f"data: {self.data}"]
        if self.predictions is not None:
            notes.append(f"accuracy: {self.predictions.told()}")
        notes += [f"output {o.name}: relative error {o.told}, cosine {o.cosine:.5f}" for o in self.outputs[:2]]
        more = len(self.outputs) - 2
        notes += [f"{more} more outputs"] if more > 0 else []
        return notes + ([f"measured on {self.measured}"] if self.measured else [])


def _unique(decisions: Sequence[Decision]) -> list[Decision]:
    return list({d.detail.get("weight", d.node): d for d in decisions}.values())


def _elements(decisions: Sequence[Decision]) -> int:
    return sum(int(d.detail.get("weights", 0)) for d in _unique(decisions))
