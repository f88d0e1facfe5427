"""Tables of what a recipe names, and the rows that other packages add to them by entry points.

A package adds a pass, an observer or a weight format by an entry point of that group: its name is the row's, its object
the class (docs/extending.md). Names are read when a table is first asked for a row; a package is imported when its own
row is asked for, or all rows are.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, Generic, TypeVar

from qcompile.passes.errors import UserError
from qcompile.passes.near import near

T = TypeVar("T")
_GROUPS = "qcompile."
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outside:
    """A row that another package adds. package, version: of its distribution."""

    package: str
    version: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Table(MutableMapping[str, T]):
    """Rows by name: qcompile's own in their order, then those of other packages by the alphabet.

    Invariant: a row that is given has one owner, and is what the table holds: a class of `kind` that says the same name
    as the entry point, or what `make` makes of it. All else is a UserError that names the distribution, when that row
    is asked for: what nobody asks for stops nothing.
    group: of entry points. word: what a row is, for messages. check: raises ValueError with what is wrong with a row.
    """

    def __init__(
        self,
        group: str,
        word: str,
        kind: type,
        own: Iterable[T],
        *,
        make: Callable[[Any], T] = lambda kind: kind,
        check: Callable[[T], None] = lambda row: None,
    ) -> None:
        self.group, self.word, self.kind, self._make, self._check = group, word, kind, make, check
        self._rows = {str(getattr(row, "name", "")): row for row in own}
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """The row; KeyError where there is none, UserError for one of another package that cannot be used."""
        if self.origin(name) is None:
            return self._rows[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __setitem__(self, name: str, row: T) -> None:
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in _outside(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._rows, *_outside(self.group)]))

    def __len__(self) -> int:
        return len({*self._rows, *_outside(self.group)})

    def own(self) -> Iterator[T]:
        """qcompile's rows alone."""
        return iter(self._rows.values())

    def origin(self, name: str) -> Outside | None:
        """The package that adds a row, None for qcompile's own; UserError where two packages add one of that name."""
        others = _outside(self.group).get(name, ())
        if name in self._rows and others:
            raise UserError(f"{self.word} {name!r} is qcompile's own, and {_told(others)} adds another: uninstall that")
        if len(others) > 1:
            raise UserError(f"{self.word} {name!r} is added by {_told(others)}: uninstall all of them but one")
        return others[0] if others else None

    def required(self, name: str) -> T:
        """The row; UserError with all names where there is none."""
        if name not in self:
            raise UserError(
                f"unknown {self.word} {name!r}; the {_plural(self.word)} are {', '.join(self)}{near(name, self)}"
            )
        return self[name]

    def usable(self) -> Iterator[T]:
        """The rows, without those of other packages that cannot be used, which the log tells."""
        for name in self:
            try:
                row = self[name]
            except UserError as error:
                _LOG.warning("%s", error)
            else:
                yield row

    def _load(self, name: str) -> T:
        outside = _outside(self.group)[name][0]
        told = f"{self.word} {name!r} of {_told([outside])} ({outside.entry.value})"
        try:
            if not _NAME.fullmatch(name):
                raise ValueError("a name has letters, digits, _ and -")
            made = outside.entry.load()
            self._admit(name, made)
            row = self._make(made)
            self._check(row)
        except (Exception, SystemExit) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise UserError(f"{told} cannot be used: {reason}; mend or uninstall that package") from error
        return row

    def _admit(self, name: str, made: Any) -> None:
        """Raise ValueError where an entry point is not a class that the table takes."""
        wanted = f"{self.kind.__module__}.{self.kind.__qualname__}"
        if not isinstance(made, type) or not issubclass(made, self.kind):
            raise ValueError(f"it is not a class that derives from {wanted}")
        if inspect.isabstract(made):
            raise ValueError(f"its class leaves out {', '.join(sorted(getattr(made, '__abstractmethods__', ())))}")
        if getattr(made, "name", None) != name:
            raise ValueError(f"its class has the name {getattr(made, 'name', None)!r}, its entry point {name!r}")


@dataclass(frozen=True, eq=False)
class OneOf(Generic[T]):
    """What a parameter that is annotated with it takes: names of a table's rows that are fit, and words beside.

    Written as Annotated[str, OneOf(table)].
    """

    table: Table[T]
    words: tuple[str, ...] = ()
    fit: Callable[[T], bool] = lambda row: True

    def takes(self, value: Any) -> bool:
        """Whether it is one of them."""
        return isinstance(value, str) and (value in self.words or (value in self.table and self.fit(self.table[value])))

    def names(self) -> list[str]:
        """All of them. Rows of other packages are not loaded for it."""
        rows = (name for name in self.table if _outside(self.table.group).get(name) or self.fit(self.table[name]))
        return [*self.words, *rows]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a pass (its constructor) or of a format (its grid) that a recipe can set."""
    return {parameter.name: parameter for parameter in _keywords(function)}


@cache
def _keywords(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Its keyword-only parameters. A plan asks a dozen times, and annotations are evaluated for an answer."""
    made = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    found = inspect.signature(made, eval_str=True).parameters.values()
    return tuple(parameter for parameter in found if parameter.kind is inspect.Parameter.KEYWORD_ONLY)


def _told(others: Iterable[Outside]) -> str:
    return " and ".join(f"the package {own}" for own in others)


def _plural(word: str) -> str:
    last = word.split()[-1]
    return f"{last}es" if last.endswith("s") else f"{last}s"


@cache
def _outside(group: str) -> Mapping[str, tuple[Outside, ...]]:
    """What other packages add to a group, by name."""
    found: dict[str, list[Outside]] = {}
    for package, version, entry in sorted(_entries(), key=lambda own: (own[2].name, own[0])):
        if entry.group == group:
            found.setdefault(entry.name, []).append(Outside(package, version, entry))
    return {name: tuple(own) for name, own in found.items()}


def modules() -> set[str]:
    """The outermost modules of all that other packages add, loaded or not."""
    return {entry.module.partition(".")[0] for _, _, entry in _entries()}


@cache
def _entries() -> list[tuple[str, str, EntryPoint]]:
    """(package, version, entry point) of all groups of qcompile; of a package that is on the path twice, the first."""
    found: dict[str, list[tuple[str, str, EntryPoint]]] = {}
    for distribution in distributions():
        try:
            own = _of(distribution)
        except Exception as error:  # somebody's broken package is no reason to do nothing
            _LOG.warning("entry points of %s cannot be read: %s", getattr(distribution, "_path", "a package"), error)
            continue
        if own:
            found.setdefault(re.sub(r"[-_.]+", "-", own[0][0]).lower(), own)
    return [entry for own in found.values() for entry in own]


def _of(distribution: Distribution) -> list[tuple[str, str, EntryPoint]]:
    if f"[{_GROUPS}" not in (distribution.read_text("entry_points.txt") or "").replace(" ", ""):
        return []
    name, version = distribution.metadata["Name"], distribution.version
    return [(name, version, entry) for entry in distribution.entry_points if entry.group.startswith(_GROUPS)]
