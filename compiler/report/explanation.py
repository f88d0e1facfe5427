"""Why a node got what it got: what each pass decided on it, the errors of what was tried, and what was measured."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.compiler.console.numbers import megabytes, percent
from qcompile.compiler.files.folders import report_path
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.passes.errors import UserError
from qcompile.passes.near import did_you_mean
from qcompile.passes.origins import fits

# Details of a decision that name the linears it is about.
_ABOUT = "linears"
# Who chose a format within a budget, and its details: bytes of the model from which on each would be best, and what the
# products take in each.
_BUDGET, _SIZES, _TIMES = "budget", "sizes", "microseconds"
_NEAREST = 3


@dataclass(frozen=True)
class Told:
    """What a pass decided on a node. candidates: squared errors of what was tried, relative to doing nothing."""

    by: str
    action: str
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    candidates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Explained:
    """A node. error: of its output on the check batches, ‖y - X W‖ / ‖X W‖, and its share of all squared errors; None
    where it was not measured.
    """

    node: str
    told: Sequence[Told]
    weight: str = ""
    weights: int = 0
    bytes: int | None = None
    error: float | None = None
    share: float | None = None
    int8_error: float | None = None
    activation_bits: int | None = None

    @property
    def is_lookup(self) -> bool:
        """Whether it looks rows of its weight up."""
        return any(told.detail.get("kind") == "Gather" for told in self.told)


@dataclass(frozen=True)
class Explanation(Shown):
    """Nodes of a compiled model, as its report has them."""

    model: str
    nodes: Sequence[Explained]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def sheet(self) -> Sheet:
        """A row for each decision on each of the nodes."""
        rows = [row for own in self.nodes for row in _rows(own)]
        return Sheet(self.model, ("node", "pass", "decision", "squared error ×"), rows)

    def records(self) -> list[dict[str, Any]]:
        """A row a node and pass."""
        return [
            {"node": own.node, "pass": told.by, "decision": told.action, "reason": told.reason, **told.detail}
            for own in self.nodes
            for told in own.told
        ]


def explain(model: Path, patterns: Sequence[str] = (), worst: int | None = None) -> Explanation:
    """The decisions on the nodes that a pattern fits, by their names or their weights', in the order of the graph; or
    on the worst of them; all nodes without a pattern.

    model: a compiled file, whose report lies beside it. UserError where it does not, a pattern fits no node, or fewer
    than one are asked for.
    """
    if worst is not None and worst < 1:
        raise UserError(f"--worst must be at least 1, got {worst}")
    path = report_path(model)
    report = _report(path, model)
    try:
        nodes = list(_nodes(report))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no report of a compile by this version: compile {model.name} again") from error
    if patterns:
        nodes = _fitting(nodes, patterns)
    if worst is not None:
        measured = [own for own in nodes if own.error is not None]
        if not measured:
            raise UserError(f"{model}: its report has no errors of nodes to rank them by: name some instead")
        nodes = sorted(measured, key=lambda own: (-(own.error or 0.0), own.node))[:worst]
    return Explanation(str(model), nodes)


def _report(path: Path, model: Path) -> Any:
    if not model.is_file():
        raise UserError(f"{model} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there: the compile of {model.name} writes it, and it tells why nodes are what they are"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"report {path} cannot be read: {str(error)[:200]}") from error


def _nodes(report: Mapping[str, Any]) -> Iterator[Explained]:
    """Nodes that a pass which quantizes decided on, in the order of the graph."""
    told = dict[str, list[Told]]()
    found = dict[str, dict[str, Any]]()
    quantizers = report.get("quantizers", ())
    for name, decisions in report["decisions"].items():
        for own in decisions:
            detail = dict(own.get("detail", {}))
            candidates = {label: _number(loss) for label, loss in detail.pop("candidates", {}).items()}
            made = Told(name, own["action"], own["reason"], detail, candidates)
            for node in detail.get(_ABOUT) or [own["node"]]:
                told.setdefault(node, []).append(made)
            if name in quantizers and own["node"]:
                found.setdefault(own["node"], detail)
    measured = {own["node"]: own | {"error": _number(own["error"])} for own in report.get("nodes", ())}
    budgeted = _budgeted(report.get("frontier") or {})
    whole = sum(own["error"] ** 2 for own in measured.values() if math.isfinite(own["error"]))
    for node, detail in found.items():
        error = measured.get(node)
        finite = error is not None and math.isfinite(error["error"])
        share = error["error"] ** 2 / whole if error is not None and finite and whole else None
        known = {} if error is None else {key: error.get(key) for key in ("error", "int8_error", "activation_bits")}
        weight, weights = str(detail.get("weight", "")), int(detail.get("weights", 0))
        every = [*budgeted.get(weight, ()), *told[node]]
        yield Explained(node, every, weight, weights, detail.get("bytes"), share=share, **known)


def _budgeted(frontier: Mapping[str, Any]) -> dict[str, list[Told]]:
    """Of weights that a budget chose formats of, by name: which one, from which size of the model on each would be best
    for the whole, and what its products take in each, where that is known.
    """
    speeds, fastest = (frontier.get("speeds") or {}).get("units"), frontier.get("fastest", False)
    found = dict[str, list[Told]]()
    for number, names in enumerate(frontier.get("units", ())):
        sizes = dict[str, int]()
        for point in () if fastest else frontier["points"]:
            sizes.setdefault(point["formats"][number], int(point["size"]))
        taken = frontier["points"][frontier["chosen"] - 1]["formats"][number]
        beside = f", for all {len(names)} that read its input" if len(names) > 1 else ""
        detail = {_SIZES: sizes} | ({_TIMES: speeds[number]} if speeds else {})
        made = Told(_BUDGET, "chosen", f"{taken}{beside}", detail)
        found |= {str(name): [made] for name in names}
    return found


def _number(error: float | None) -> float:
    """Of a strict JSON, where null stands for what is no finite number."""
    return math.inf if error is None else error


def _fitting(nodes: Sequence[Explained], patterns: Iterable[str]) -> list[Explained]:
    kept = set[str]()
    for pattern in patterns:
        own = {node.node for node in nodes if fits(pattern, node.node) or fits(pattern, node.weight)}
        if not own:
            names = [name for node in nodes for name in (node.node, node.weight)]
            hint = did_you_mean(pattern, names, "--worst 10 lists those of largest error", _NEAREST, alike=0.3)
            raise UserError(f"{pattern!r} fits no node that was quantized or left in float; {hint}")
        kept |= own
    return [node for node in nodes if node.node in kept]


def _rows(own: Explained) -> Iterator[tuple[str, str, str, str]]:
    size = "" if own.bytes is None else f", {megabytes(own.bytes)}"
    size += f", {8 * own.bytes / own.weights:.2f} bits each" if own.bytes and own.weights else ""
    yield own.node, "", f"{own.weights:,} weights{size}", ""
    for told in own.told:
        yield "", told.by, f"{told.action}: {told.reason}", _factor(told)
        for label, size in told.detail.get(_SIZES, {}).items() if told.by == _BUDGET else ():
            yield "", "", f"  {label} in models from {megabytes(size)} on", ""
        for label, time in told.detail.get(_TIMES, {}).items() if told.by == _BUDGET else ():
            yield "", "", f"  {label} takes {time:.1f} µs", ""
        for label, loss in sorted(told.candidates.items(), key=lambda item: item[1]):
            yield "", "", f"  tried {label}", f"{loss:.3f}"
    if own.error is not None:
        share = "" if own.share is None else f", {percent(own.share)} of all squared errors"
        yield "", "checks", f"relative error {own.error:.2g} of its output{share}", ""
    if own.int8_error is not None:
        yield "", "checks", f"int8 activations would add {own.int8_error:.2g}: {own.activation_bits} bits", ""


def _factor(told: Told) -> str:
    loss, error = told.detail.get("relative_loss"), told.detail.get("relative_error")
    if isinstance(loss, float):
        return f"{loss:.3f}"
    return f"({error:.2g} relative error)" if isinstance(error, float) else ""
