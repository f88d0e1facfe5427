"""Bounds on any figure of an evaluation, from a file: what holds, what is broken, and JUnit XML for CI."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qcompile.compiler.console.visible import told_apart
from qcompile.compiler.data.tokens import read_text
from qcompile.compiler.measure.changes import TokenChanges
from qcompile.compiler.measure.classes import ClassScores
from qcompile.compiler.measure.evaluate import DecoderScores, OutputScores
from qcompile.compiler.measure.paired import Paired
from qcompile.compiler.measure.tasks.scoring import TaskScores
from qcompile.compiler.measure.tasks.table import TASKS
from qcompile.compiler.report.sizes import Sizes
from qcompile.compiler.results.sheet import Sheet
from qcompile.compiler.settings.files import plain_of
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

# What a row has that is no figure.
_WORDS = {"model", "output", "classes", "changes", "task", "digest", "paired", "count"}
_BINS = "kl_by_position"
# Broken bounds that a line names; the table has all.
_TOLD = 4


def _figures(*kinds: type) -> set[str]:
    return {own.name for kind in kinds for own in fields(kind)} - _WORDS


_ALONE = (_figures(DecoderScores, Sizes) | {"perplexity"}) - {"kl", "kl_error", "agreement"}
_TEXT = _figures(DecoderScores, TokenChanges, Sizes) | {"perplexity"}
# Of every task, behind tasks.NAME.
_TASK_ALONE = _figures(TaskScores)
_TASK = _TASK_ALONE | _figures(Paired)
_OUTPUT = _figures(OutputScores, Sizes) | {f"classes.{name}" for name in _figures(ClassScores)}
# Of outputs, what is known by labels and by a metric alone.
_BY_LABELS = {f"classes.{name}" for name in _figures(Paired)}
_BY_METRIC = {"metric", "reference_metric"}


@dataclass(frozen=True)
class Bound:
    """The least and the most that a figure may be; None for no end."""

    figure: str
    min: float | None
    max: float | None

    @property
    def told(self) -> str:
        """As a condition."""
        least = f"{self.min:g} <= " if self.min is not None else ""
        return f"{least}{self.figure}" + (f" <= {self.max:g}" if self.max is not None else "")


@dataclass(frozen=True)
class Kept:
    """A bound on one figure of a model; on: the text, the output, the task. holds: whether the value is within it."""

    bound: str
    min: float | None
    max: float | None
    model: str
    on: str
    value: float
    holds: bool


@dataclass(frozen=True)
class Gate:
    """Bounds by the names of figures in the JSON of `qcompile eval`; those of a table in it with a dot: classes.top1.

    Each is for every model and every text, or output; the reference is not judged.
    """

    name: str
    bounds: Sequence[Bound]

    @classmethod
    def read(cls, path: Path) -> "Gate":
        """From a YAML or TOML file; UserError for what it does not say well."""
        try:
            return cls.of(plain_of(read_text(path), toml=path.suffix.lower() == ".toml"), str(path))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from error

    @classmethod
    def of(cls, plain: Any, name: str = "gate") -> "Gate":
        """From plain values: {"kl": {"max": 0.1}}."""
        if not isinstance(plain, Mapping) or not plain:
            raise UserError(f"{name}: a gate is a table of bounds, such as `kl: {{max: 0.1}}`")
        return cls(name, [_bound(name, figure, given) for figure, given in _flat(plain)])

    def check_asked(self, *, decoder: bool, against: bool, tasks: Sequence[str], labels: bool, metric: bool) -> None:
        """Raise UserError for a bound on a figure that such an evaluation does not have: said before the work."""
        of_outputs = _OUTPUT - (set() if labels else _BY_LABELS) - (set() if metric else _BY_METRIC)
        there = _there(against=against, tasks=tasks) if decoder else of_outputs
        for own in self.bounds:
            if own.figure not in there:
                why = _why_not(own.figure, decoder=decoder, tasks=tasks)
                raise UserError(f"{self.name}: there is no {own.figure} here: {why}")

    def kept(self, rows: Sequence[Mapping[str, Any]]) -> list[Kept]:
        """Every bound on every row of its kind, which are as `Evaluation.records` has them, without the reference's.

        UserError for a figure that a row has not; of classes, that no output has.
        """
        found, names = [], told_apart(row["text"] for row in rows if "text" in row)
        for bound in self.bounds:
            own = [made for row in rows for made in _kept(self.name, bound, row, names)]
            if not own:
                few = " six or more" * (bound.figure == "classes.top5")
                raise UserError(f"{self.name}: {bound.figure} is not known here: no output scores{few} classes")
            found += own
        return found


def broken(kept: Sequence[Kept]) -> str:
    """The bounds that do not hold, in a line; empty where all do."""
    found = [own for own in kept if not own.holds]
    if not found:
        return ""
    more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    each = "; ".join(
        f"{own.model}{f', {own.on}' * bool(own.on)}: {own.value:.4g} breaks {own.bound}" for own in found[:_TOLD]
    )
    return f"{len(found)} of {len(kept)} bounds are broken: {each}{more}"


def gate_sheet(kept: Sequence[Kept]) -> Sheet:
    """Every bound, and whether it holds."""
    heads = ("bound", "model", "on", "value", "holds")
    rows = [[own.bound, own.model, own.on, f"{own.value:.5g}", "yes" if own.holds else "BROKEN"] for own in kept]
    return Sheet("", heads, rows, 2)


def junit(kept: Sequence[Kept], tasks: Sequence[TaskScores] = (), missing: str = "") -> str:
    """The same as JUnit XML: a test case for each bound, named by its figure; its class is the model.

    Tasks are test cases, too, which pass: what they found is in their output. missing: why there is a figure that is
    not known, an error: no bound was judged, and none has passed.
    """
    failures, cases = str(sum(not own.holds for own in kept)), len(kept) + len(tasks) + bool(missing)
    counts = {"tests": str(cases), "failures": failures, "errors": str(int(bool(missing)))}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "qcompile eval", **counts})
    for own in kept:
        name = f"{own.bound} ({own.on})" if own.on else own.bound
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": _xml(own.model), "name": _xml(name), "time": "0"}
        )
        if not own.holds:
            told = f"{own.value:.6g} breaks {own.bound}"
            ElementTree.SubElement(case, "failure", {"message": told, "type": "bound"}).text = told
    if missing:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "gate", "name": "figures are known", "time": "0"}
        )
        ElementTree.SubElement(case, "error", {"message": _xml(missing), "type": "figure"}).text = _xml(missing)
    for score in tasks:
        names = {"classname": _xml(score.model), "name": f"task {score.task}", "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", names)
        ElementTree.SubElement(case, "system-out").text = _xml(score.told())
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML has no place for."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def _there(*, against: bool, tasks: Sequence[str]) -> set[str]:
    """The figures of decoders on text and on tasks."""
    each = _TASK if against else _TASK_ALONE
    return (_TEXT if against else _ALONE) | {f"tasks.{task}.{figure}" for task in tasks for figure in each}


def _why_not(figure: str, *, decoder: bool, tasks: Sequence[str]) -> str:
    """Why an evaluation does not have a figure, or what gives it."""
    if not decoder and figure in _BY_LABELS | _BY_METRIC:
        return "give --labels FILE" if figure in _BY_LABELS else "give --metric module:function"
    if not decoder:
        return "only decoders on --text have it"
    if figure in _OUTPUT - _TEXT:
        return "only outputs of models that are no decoders on --text have it"
    if figure in _there(against=True, tasks=tasks):
        return "it compares with a reference: give --against"
    return f"ask for the task {figure.split('.')[1]} by --tasks"


def _bound(name: str, figure: str, given: Any) -> Bound:
    known = _there(against=True, tasks=list(TASKS)) | _OUTPUT
    if figure not in known:
        raise UserError(f"{name}: no figure {figure!r}{near(figure, sorted(known))} (docs/verdict.md lists them)")
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{name}: {figure} takes bounds, such as `{figure}: {{max: 0.1}}`, got {given!r}")
    ends: dict[str, float] = {}
    for key, value in given.items():
        if key not in ("min", "max"):
            raise UserError(f"{name}: {figure} takes min and max, got {key!r}")
        ends[key] = _number(value)
        if math.isnan(ends[key]):
            raise UserError(f"{name}: {key} of {figure} is a number, got {value!r}")
    if ends.get("min", -math.inf) > ends.get("max", math.inf):
        raise UserError(f"{name}: {figure} has min {ends['min']:g} above max {ends['max']:g}")
    return Bound(figure, ends.get("min"), ends.get("max"))


def _flat(plain: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Figures by their names with dots, however tables are nested: TOML makes tables of names with dots."""
    for key, given in plain.items():
        figure = f"{before}{key}"
        if isinstance(given, Mapping) and given and all(isinstance(own, Mapping) for own in given.values()):
            yield from _flat(given, f"{figure}.")
        else:
            yield figure, given


def _number(value: Any) -> float:
    """NaN for what is none; YAML reads 1e-3 as text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _kept(name: str, bound: Bound, row: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Kept]:
    """A bound on a row that has its figure; on several where that is one for each bin of positions. names: of texts."""
    on, figure, task = str(row.get("output", "")), bound.figure, row.get("task")
    if bound.figure.startswith("tasks.") or task is not None:
        on, before = f"task {task}", f"tasks.{task}."
        if not bound.figure.startswith(before):
            return
        figure = bound.figure.removeprefix(before)
    elif "text" in row:
        on = names[row["text"]]
    value: Any = row
    for part in figure.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None and not figure.startswith("classes."):  # of outputs, not all score classes
        why = "it has no linear weights" if figure == "linear_bits" else "the text is too short for it"
        raise UserError(f"{name}: {bound.figure} is not known of {row['model']} on {on}: {why}")
    bins = bound.figure == _BINS and value is not None
    for where, own in [(f"{on}, {one['first']}-{one['last']}", one["kl"]) for one in value] if bins else [(on, value)]:
        if own is not None:
            holds = (bound.min is None or own >= bound.min) and (bound.max is None or own <= bound.max)
            yield Kept(bound.told, bound.min, bound.max, str(row["model"]), where, float(own), bool(holds))
