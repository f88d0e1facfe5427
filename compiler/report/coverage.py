"""What became of every large float constant: each is quantized or has its reason; leaving too much in float fails.

Invariant: behind `account`, the decisions of the quantizing pass name every float constant of the finished graph that
is in the census (1,024 elements or more, in any graph), with its elements and bytes, what reads it and why it is float.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.compiler.console.numbers import percent
from qcompile.compiler.facts.census import Family, FloatConstant, Reader, census, family_of
from qcompile.compiler.results.report import PRODUCTS, Report
from qcompile.passes import lists
from qcompile.passes.base import Decision, Pass
from qcompile.passes.contract import Fact
from qcompile.passes.errors import BrokenPromise, UserError, Verdict
from qcompile.passes.linears import as_linear, find_embeddings
from qcompile.passes.policy import Policy
from qcompile.passes.state import node_state

# Without --min-coverage: what must be quantized of the families that the list has formats for, and of all products.
DEFAULT, DEFAULT_OF_ALL = 0.95, 0.5
# The list that quantizes the weights of a family.
_LISTS = {"MatMul": lists.BEST, "Conv": lists.CORRECTED}
# Operators whose weights those lists take.
_TAKEN = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
_WORDS = {"MatMul": "MatMul", "Conv": "Conv"}


def quantizers(passes: Sequence[Pass]) -> list[Pass]:
    """The passes whose decisions say which weights became codes."""
    return [p for p in passes if Fact.FLOAT in p.takes]


@dataclass(frozen=True)
class Recorded:
    """A float constant of the prepared model. It holds no value: numbers go as soon as a pass has made codes of them.

    readers: names of the nodes that compute with it. operator: of the first.
    """

    name: str
    size: int
    family: Family
    readers: tuple[str, ...]
    operator: str


def record(model: ir.Model) -> list[Recorded]:
    """The census of a model as it is now, for `account` to compare with what becomes of it."""
    return [
        Recorded(own.name, own.size, own.family, tuple(r.name for r in own.readers), own.readers[0].node.op_type)
        for own in census(model)
    ]


def account(before: Sequence[Recorded], model: ir.Model, passes: Sequence[Pass], policy: Policy) -> list[Decision]:
    """The decisions of the list's quantizing passes with every constant left in float among them.

    before: the record of the prepared model. model: the finished graph, not lowered yet. Decisions on nodes that read
    constants left in float are replaced, one for each constant; those of smaller weights stay as they are.
    """
    made = [decision for p in quantizers(passes) for decision in p.decisions]
    known = {constant.name for constant in before}
    after = [constant for constant in census(model) if constant.name in known or _weight(constant, known)]
    for p in quantizers(passes):
        _check_codes(p, after)
    told = {d.node: d for d in reversed(made) if d.action != "quantized"}
    left = [_told(constant, told, policy, passes) for constant in after]
    left += _vanished(before, {constant.name for constant in after}, made)
    return list(_merged(made, left, {reader.name for constant in after for reader in constant.readers}))


def in_order(made: Sequence[Decision], order: Mapping[str, int]) -> list[Decision]:
    """Decisions by the places of their nodes in the prepared graph; one without a place goes with the one before it."""
    places, last = list[int](), -1
    for decision in made:
        last = order.get(decision.node, last)
        places.append(last)
    return [made[i] for i in sorted(range(len(made)), key=lambda i: places[i])]


def _check_codes(made: Pass, after: Sequence[FloatConstant]) -> None:
    """BrokenPromise where a pass says of a product or lookup that it is quantized, and of nothing in it that it is not,
    and it reads a float weight.
    """
    actions: dict[str, set[str]] = {}
    for decision in made.decisions:
        actions.setdefault(decision.node, set()).add(decision.action)
    for constant in (own for own in after if own.family != "other"):
        for reader in constant.readers:
            if actions.get(reader.name) == {"quantized"}:
                told = f"node {reader.name} is said to be quantized and reads the float weight {constant.name}"
                raise BrokenPromise(made.name, told)


def _weight(constant: FloatConstant, known: set[str]) -> bool:
    """Whether a constant that the prepared model had not is a weight, and not a part of one ("w.outliers" of "w")."""
    stems = (constant.name[:end] for end, letter in enumerate(constant.name) if letter == ".")
    return constant.family in PRODUCTS and not any(stem in known for stem in stems)


def _told(constant: FloatConstant, told: Mapping[str, Decision], policy: Policy, passes: Sequence[Pass]) -> Decision:
    """Why a constant is in float: its first reader that is not so by the user's choice, else the first reader."""
    verdicts = [(reader, *_verdict(reader, constant, told, policy, passes)) for reader in constant.readers]
    reader, action, reason = next((v for v in verdicts if v[1] != "kept"), verdicts[0])
    detail = {"kind": reader.node.op_type, "weights": constant.size, "weight": constant.name, "bytes": constant.nbytes}
    computed = {"computed": True} if node_state(reader.node).left else {}
    return Decision(reader.name, action, reason, detail | computed | {"family": constant.family})


def _verdict(
    reader: Reader, constant: FloatConstant, told: Mapping[str, Decision], policy: Policy, passes: Sequence[Pass]
) -> tuple[str, str]:
    refused = policy.kept.get(reader.name) or policy.refusal(reader.node, constant.value)
    if refused and quantizers(passes):
        return "kept", refused
    known = told.get(reader.name)
    if known is not None:
        return known.action, known.reason
    if left := node_state(reader.node).left:
        return "skipped", left
    return "skipped", _reason(reader, [p.name for p in quantizers(passes)])


def _reason(reader: Reader, names: Sequence[str]) -> str:
    """What can be said of a constant that no pass decided on."""
    operator = f"{reader.node.domain}.{reader.node.op_type}" if reader.node.domain else reader.node.op_type
    if not names:
        return "no pass of the list quantizes weights"
    if reader.node.domain == "com.microsoft.nchwc":
        return f"{operator} is how ONNX Runtime optimized the model for one kind of CPU: compile what it was made from"
    if reader.owner is not None and reader.family != "other":
        return f"read by {operator} in the body of {reader.owner.op_type} node {reader.owner.name}"
    if reader.family == "other":
        return f"read by {operator}, which no format is for"
    if reader.family == "Gather" and list(find_embeddings([reader.node])):
        return f"a small table of {operator} that belongs to no segment of the calibration run"
    if reader.family == "Gather":
        return f"a table of {operator} that is read in another way than by rows"
    if reader.node.op_type == "MatMul" and reader.node.domain == "" and isinstance(why := as_linear(reader.node), str):
        return why
    return f"{names[0]} has no format for weights of {operator}"


def _vanished(before: Sequence[Recorded], there: set[str], made: Sequence[Decision]) -> Iterator[Decision]:
    """Weights of the prepared model that are gone, and no decision says that they became codes."""
    codes = {str(d.detail.get("weight", d.node)) for d in made if d.action == "quantized"}
    codes |= {code[:i] for code in codes for i, letter in enumerate(code) if letter == "."}  # W.codes are those of W
    nodes = {d.node for d in made if d.action == "quantized"}
    for constant in before:
        if constant.family not in PRODUCTS or constant.name in there or constant.name in codes:
            continue
        if not nodes.intersection(constant.readers):
            detail = {"kind": constant.operator, "weights": constant.size, "weight": constant.name}
            yield Decision(constant.readers[0], "skipped", "gone from the graph, and no pass says how", detail)


def _merged(made: Sequence[Decision], left: Sequence[Decision], readers: set[str]) -> Iterator[Decision]:
    """`made` with `left` in the places of what was decided on the same nodes, else at the end."""
    waiting: dict[str, list[Decision]] = {}
    for decision in left:
        waiting.setdefault(decision.node, []).append(decision)
    for decision in made:
        if decision.action == "quantized" or decision.node not in readers:
            yield decision
        else:
            yield from waiting.pop(decision.node, ())
    for rest in waiting.values():
        yield from rest


@dataclass(frozen=True)
class Shortfall:
    """A share of weights that is too small, and in what words."""

    share: float
    least: float
    told: str


def check_coverage(report: Report, least: float | None, passes: Sequence[Pass]) -> None:
    """Raise Verdict where too little was quantized, UserError where nothing was.

    Case 1: a list with a quantizer that quantized nothing, though not all is in float by the user's choice.
    Case 2: `least` given: less of the MatMul-like weights, or of the convolutions', each by itself.
    Case 3: not given: less than 95 % of a family that the list has formats for, or less than half of all products.
    0 lets everything pass.
    """
    own = quantizers(passes)
    if not own or least == 0:
        return
    if not any(d.action in ("quantized", "kept") for d in report.quantizing):  # Case 1
        raise UserError(_nothing(report, own[0].name))
    for short in _shortfalls(report, least, {f for p in own for f in p.families}):
        raise Verdict(
            f"only {percent(short.share)} of the {short.told} weights were quantized, below "
            f"{'--min-coverage ' if least is not None else ''}{short.least:g}; "
            f"left in float: {'; '.join(_reasons(report))}{_better(report, own[0].name)}; "
            "--min-coverage 0 takes it so; no output was written"
        )


def _shortfalls(report: Report, least: float | None, families: set[str]) -> Iterator[Shortfall]:
    shares = {family: report.share(family) for family in PRODUCTS}
    for family, share in shares.items():
        bound = DEFAULT if least is None and family in families else least
        if bound is not None and share is not None and share < bound:
            yield Shortfall(share, bound, _WORDS[family])
    if least is None and report.coverage < DEFAULT_OF_ALL:
        yield Shortfall(report.coverage, DEFAULT_OF_ALL, report.kinds)


def _reasons(report: Report) -> list[str]:
    """Why products' weights are in float, those of most elements first, with their share of all elements.

    Weights below the census's size may have decisions that tell no size.
    """
    sizes: dict[str, int] = {}
    for decision in report.skipped_products:
        sizes[decision.reason] = sizes.get(decision.reason, 0) + int(decision.detail.get("weights", 0))
    total = sum(report.elements(family, action) for family in PRODUCTS for action in ("quantized", "skipped"))
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{reason} ({size / total:.1%} of all)" if total else reason for reason, size in ordered[:4]]


def _nothing(report: Report, name: str) -> str:
    if not report.quantizing:
        told = report.coded or "it has no constant weight"
        return f"{name} quantizes nothing of this model: {told}; no output was written"
    reasons = _reasons(report) or list(dict.fromkeys(d.reason for d in report.quantizing))[:4]
    if report.coded and not report.skipped_products:
        reasons.insert(0, report.coded)
    told = "; ".join(reasons)
    return f"{name} quantizes nothing of this model: {told}{_better(report, name)}; no output was written"


def _better(report: Report, name: str) -> str:
    """The list that is for most of what was left, if it is another one; by nodes where no size is told.

    None is for weights that are computed when the model runs.
    """
    stored = [d for d in report.skipped_products if not d.detail.get("computed")]
    nodes = Counter(family_of(str(d.detail["kind"])) for d in stored)
    left = {family: (report.elements(family, "skipped"), nodes[family]) for family in PRODUCTS}
    family = max(left, key=left.__getitem__)
    taken = any(d.detail["kind"] in _TAKEN and family_of(d.detail["kind"]) == family for d in stored)
    better = _LISTS[family]
    return f"; --passes {better} is for them" if taken and name not in better.split(",") else ""
