"""What differs between two models: formats, bytes and errors of their weights, totals, recipes, operators."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.console.numbers import megabytes, percent
from qcompile.compiler.report.inspection import described, operators_of, pattern_of
from qcompile.compiler.report.matching import File, Own, matched, same_numbers
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.passes.errors import UserError
from qcompile.passes.joined_names import joined_name

# How many of a list are shown; of operators, settings and layers.
_FEW, _MOST = 4, 8
_SOURCE = "qcompile.source"


@dataclass(frozen=True)
class Side:
    """A node's weights in one of the models. form: as `inspect` tells it, several with a +. weights: how many numbers.
    bytes: without those that an earlier node reads, too. error: of its output on the check batches, of joined nodes the
    root mean square; None where no report tells. decisions: the report's, in words.
    """

    form: str
    operator: str
    kind: str
    weights: int
    bytes: int
    error: float | None = None
    decisions: Sequence[str] = ()


@dataclass(frozen=True)
class Pair:
    """A node in both models, or in one. same: both have the same numbers, bit by bit."""

    node: str
    a: Side | None
    b: Side | None
    same: bool = False

    @property
    def growth(self) -> float:
        """By how much its error is larger in b; a weight without an error has none."""
        before, after = (0.0 if own is None or own.error is None else own.error for own in (self.a, self.b))
        return 0.0 if before == after else after - before


@dataclass(frozen=True)
class Layer:
    """A value that goes on from one part of both graphs to the next. behind: the nearest node with a weight before it.
    error: ‖b - a‖ / ‖a‖ of it.
    """

    value: str
    behind: str
    error: float


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """What differs from model a to model b; prints as a table of nodes.

    nodes: those with weights, in the order of a. bytes: of all files. formats, kinds: bytes of weights in a and in b.
    operators: how many there are, where that differs. recipe: settings that differ, None where a file has none.
    compiled: whether qcompile made them. notes: what else differs. scores: of b against a, on the data that was given;
    layers: the same of values between.
    shown: how many nodes are listed by themselves, those whose errors grew most; 0: all that differ, in graph
    order; None: alike ones together.
    """

    a: str
    b: str
    nodes: Sequence[Pair]
    bytes: tuple[int, int]
    formats: Mapping[str, tuple[int, int]]
    kinds: Mapping[str, tuple[int, int]]
    operators: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, tuple[Any, Any]]
    notes: Sequence[str] = ()
    scores: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[Layer] = ()
    compiled: tuple[bool, bool] = (False, False)
    shown: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, all nodes among them."""
        plain = asdict(self)
        del plain["shown"]
        return plain

    def records(self) -> list[dict[str, Any]]:
        """A row a node."""
        return [{"node": own.node, "same": own.same, **_flat("a", own.a), **_flat("b", own.b)} for own in self.nodes]

    def sheet(self) -> Sheet:
        """Nodes that differ; below, what does not go into rows."""
        heads = ("node", "count", "a", "b", "bytes a", "bytes b", "error a", "error b")
        return Sheet(f"a {self.a}, b {self.b}", heads, list(self._rows()), 4, list(self._told()))

    def _rows(self) -> Iterator[Sequence[str]]:
        changed = [own for own in self.nodes if not own.same]
        if self.shown:
            grown = (own for own in changed if own.growth > 0)
            changed = sorted(grown, key=lambda own: -own.growth)[: self.shown]
        alike: dict[Any, list[Pair]] = {}
        for number, own in enumerate(changed):
            key = (pattern_of(own.node), *(side and side.form for side in (own.a, own.b)))
            alike.setdefault(key if self.shown is None else number, []).append(own)
        for pairs in alike.values():
            name = pairs[0].node if len(pairs) == 1 else f"{pattern_of(pairs[0].node)}…"
            sides = [[own.a for own in pairs if own.a], [own.b for own in pairs if own.b]]
            forms = [side[0].form if side else "–" for side in sides]
            yield name, str(len(pairs)), *forms, *map(_bytes, sides), *map(_error, sides)

    def _told(self) -> Iterator[str]:
        if self.shown and not any(self._rows()):
            yield "no node that differs has a larger error in b"
        if same := sum(own.same for own in self.nodes):
            yield f"the same, bit by bit: {same} of {len(self.nodes)} nodes with weights"
        for name, other in (("a", "b"), ("b", "a")):
            if own := [pair.node for pair in self.nodes if getattr(pair, other) is None]:
                yield f"only in {name}: {_few(own)}"
        share = f" ({percent(self.bytes[1] / self.bytes[0])})" if self.bytes[0] else ""
        yield f"files: {_change(self.bytes)}{share}"
        for title, table in (("format", self.formats), ("kind", self.kinds)):
            yield f"by {title}: {'; '.join(f'{name} {_change(own)}' for name, own in table.items())}"
        if self.operators:
            most = sorted(self.operators.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
            yield f"operators: {_few([f'{name} {a} → {b}' for name, (a, b) in most], _MOST)}"
        yield from map(_scored, self.scores)
        if self.layers:
            spread = sorted({round(at * (len(self.layers) - 1) / (_MOST - 1)) for at in range(_MOST)})
            shown = [f"{own.behind or own.value} {own.error:.2g}" for own in (self.layers[at] for at in spread)]
            left = f" ({len(self.layers)} in --json)" if len(shown) < len(self.layers) else ""
            yield f"relative error of what goes on, on one window, behind {', '.join(shown)}{left}"
        yield from self._recipes()
        yield from self.notes

    def _recipes(self) -> Iterator[str]:
        for key, both in self.recipe.items():
            if self.compiled == (True, True):
                yield f"recipe: {key} {' → '.join(map(_setting, both))}"
            elif key == "passes":
                name, made = ("a", both[0]) if self.compiled[0] else ("b", both[1])
                yield f"recipe: {name} alone was compiled, by passes {_setting(made)}"


def difference(a: Path, b: Path, *, every: bool = False, worst: int | None = None) -> Difference:
    """What differs from one model file to another; errors and decisions where reports lie beside them.

    every: all nodes that differ by themselves. worst: those whose errors grew most, so many. UserError for a file that
    is no model, for fewer than one of the worst, and where no errors tell which these are.
    """
    if worst is not None and worst < 1:
        raise UserError(f"--worst must be at least 1, got {worst}")
    first, second = File(a), File(b)
    nodes = [_pair(*sides) for sides in matched(first, second)]
    if worst is not None and not any(side and side.error for own in nodes for side in (own.a, own.b)):
        raise UserError(f"no report beside {a} or {b} has errors of nodes to rank them by: leave out --worst")
    kinds = _both(*(own.totals(lambda weight: weight.kind) for own in (first, second)), none=0)
    left = [own.bytes - sum(own.sizes) for own in (first, second)]
    return Difference(
        str(a),
        str(b),
        nodes,
        (first.bytes, second.bytes),
        _both(*(own.totals(lambda weight: weight.form) for own in (first, second)), none=0),
        {**kinds, "all else": (left[0], left[1])},
        _changed(_both(operators_of(first.model), operators_of(second.model), none=0)),
        _changed(_both(first.recipe, second.recipe, none=None)),
        list(_notes(first, second)),
        compiled=(first.compiled, second.compiled),
        shown=0 if every and worst is None else worst,
    )


def _pair(a: Sequence[Own], b: Sequence[Own]) -> Pair:
    sides = _side(a), _side(b)
    alike = sides[0] is not None and sides[1] is not None and (sides[0].form, sides[0].weights) == (
        sides[1].form, sides[1].weights)  # fmt: skip
    return Pair(_name(a, b), *sides, alike and same_numbers(a, b))


def _name(a: Sequence[Own], b: Sequence[Own]) -> str:
    """What a report calls the node, where one of the files has it alone; else a's name."""
    single = [own[0].node for own in (a, b) if len({each.node for each in own}) == 1]
    known = {name for own in (*a, *b) for name in own.file.explained}
    return next((name for name in single if name in known), single[0] if single else joined_name([o.node for o in a]))


def _side(own: Sequence[Own]) -> Side | None:
    weights = [weight for node in own for weight in node.weights]
    if not weights:
        return None
    told = [said for node in own for said in node.told]
    errors = [said.error for said in told if said.error is not None]
    error = math.sqrt(sum(value**2 for value in errors) / len(errors)) if errors else None
    decisions = (f"{each.by}: {each.action}: {each.reason}" for said in told for each in said.told)
    return Side(
        " + ".join(dict.fromkeys(weight.form for weight in weights)),
        " + ".join(dict.fromkeys(weight.operator for weight in weights)),
        weights[0].kind,
        sum(weight.size for weight in weights),
        sum(node.bytes for node in own),
        error,
        list(dict.fromkeys(decisions)),
    )


def _notes(a: File, b: File) -> Iterator[str]:
    """What else differs: inputs, outputs, operator sets, sources; and what is not known."""
    for what in ("inputs", "outputs"):
        own = [dict.fromkeys(map(described, getattr(file.model.graph, what))) for file in (a, b)]
        for name, there, missing in (("a", own[0], own[1]), ("b", own[1], own[0])):
            if gone := [value for value in there if value not in missing]:
                yield f"{what} of {name} alone: {_few(gone)}"
    for domain, (before, after) in _changed(_both(*(file.model.opset_imports for file in (a, b)), none=None)).items():
        yield f"opset {domain or 'ai.onnx'}: {_setting(before)} → {_setting(after)}"
    sources = {file.model.metadata_props.get(_SOURCE) for file in (a, b) if file.compiled}
    if len(sources) > 1:
        yield "they were compiled from different files"
    for file in (a, b):
        if file.compiled and not file.explained:
            yield f"no errors and decisions of {file.path}: no report that can be read lies beside it"


def _both(a: Mapping[Any, Any], b: Mapping[Any, Any], *, none: Any) -> dict[Any, tuple[Any, Any]]:
    return {key: (a.get(key, none), b.get(key, none)) for key in dict.fromkeys((*a, *b))}


def _changed(both: Mapping[Any, tuple[Any, Any]]) -> dict[Any, tuple[Any, Any]]:
    return {key: own for key, own in both.items() if own[0] != own[1]}


def _flat(name: str, side: Side | None) -> dict[str, Any]:
    return {f"{key}_{name}": value for key, value in (asdict(side) if side is not None else {}).items()}


def _bytes(sides: Sequence[Side]) -> str:
    size = sum(own.bytes for own in sides)
    return megabytes(size) if size else "shared" if sides else "–"


def _error(sides: Sequence[Side]) -> str:
    """The largest of alike nodes."""
    errors = [own.error for own in sides if own.error is not None]
    return f"{max(errors):.2g}" if errors else "–"


def _change(sizes: tuple[int, int]) -> str:
    return " → ".join(megabytes(size) for size in sizes)


def _scored(row: Mapping[str, Any]) -> str:
    if row.get("kl") is not None:
        told = f"KL(a ‖ b) {row['kl']:.5f} ± {row['kl_error']:.5f} nats a token on {Path(row['text']).name}"
        return f"{told}, same most likely token {percent(row['agreement'])}"
    return f"output {row['output']}: SQNR {row['sqnr']:.2f} dB, cosine {row['cosine']:.6f}"


def _few(told: Sequence[str], most: int = _FEW) -> str:
    return f"{', '.join(told[:most])}{f' and {len(told) - most} more' * (len(told) > most)}"


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return _few([*map(str, value)], _MOST) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
