"""Settings that are declared once, by the fields of a dataclass: their checks, files, options and documentation follow.

    samples: Annotated[int, About("calibration windows (default: {default})", DATA, least=1, metavar="N")] = 32

The type says which values there are: int, float, bool, str, `Step` (a name with parameters), `Literal`, None, a union
of these, or a tuple of one; `About` says the rest. Standard annotations, so that other libraries read them, too.
"""

import math
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Union

from qcompile.compiler.settings.steps import Step, parse_passes, parse_step
from qcompile.passes.errors import UserError
from qcompile.passes.near import near


@dataclass(frozen=True)
class About:
    """What the type of a setting does not say.

    told: help, in which {default} stands for the default and {formats} for the names of the weight formats. group: the
    heading that its option stands under. word: how files and options write None; without one it is left out of them.
    metavar: what the help shows for a value, else its choices. least, most: of a number, inclusive; besides: numbers
    beyond them. positive: above 0, and finite.
    wrong: what is told of a value of the right type, else made from the choices and ends. opposite: of a bool, the name
    of the option that says False, and its help.
    """

    told: str
    group: str
    word: str = ""
    metavar: str = ""
    least: float | None = None
    most: float | None = None
    besides: tuple[float, ...] = ()
    positive: bool = False
    wrong: Callable[[Any], str] | None = None
    opposite: tuple[str, str] | None = None


@dataclass(frozen=True)
class Setting:
    """One field. kinds: classes of its values, of those of a tuple where there are `many`. choices: by `Literal`."""

    name: str
    about: About
    default: Any
    kinds: tuple[type, ...]
    choices: tuple[Any, ...]
    many: bool

    @property
    def option(self) -> str:
        """The option that sets it."""
        return "--" + self.name.replace("_", "-")

    @property
    def values(self) -> list[str]:
        """The values that have names, as help and messages write them."""
        named = [*map(str, self.choices), *(["FORMAT"] if Step in self.kinds else [])]
        return [*named, *([self.about.word] if self.about.word else [])]

    @property
    def takes(self) -> str:
        """The same in words: "4, 8, a weight format or keep"."""
        kinds = {int: "an integer", float: "a number"}
        numbers = [] if self.choices else [kinds[kind] for kind in self.kinds if kind in kinds]
        words = [*numbers, *(value.replace("FORMAT", "a weight format") for value in self.values)]
        return " or ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])

    def told(self, **words: str) -> str:
        """Its help."""
        return self.about.told.format(default=self.default_text, **words)

    @property
    def default_text(self) -> str:
        """The default as an option is given it; empty for none."""
        plain = self.plain(self.default)
        if isinstance(plain, bool):
            return str(plain).lower()
        return ",".join(plain) if isinstance(plain, list) else "" if plain is None else str(plain)

    def read(self, plain: Any, source: str) -> Any:
        """The value that a file's or an option's plain value stands for; UserError for one of another type."""
        wrong = UserError(f"{source}: {self.name} must be {self._expected}, got {shown(plain)}")
        if self.many:
            items = [plain] if isinstance(plain, str) else plain
            if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
                raise wrong
            return parse_passes(",".join(items)) if Step in self.kinds else tuple(items)
        word = isinstance(plain, str) and plain and plain == self.about.word
        if types.NoneType in self.kinds and (plain is None or word):
            return None
        if isinstance(plain, str) and Step in self.kinds:
            return parse_step(plain, f"{source}: {self.name}")
        if not self._is_of(plain, *self.kinds):
            raise wrong
        return plain

    def of_text(self, value: Any) -> Any:
        """A value given in Python: one that is text where a file has text stands for what it does there."""
        names = isinstance(value, (list, tuple)) and Step in self.kinds and any(isinstance(own, str) for own in value)
        if names and not self.many:
            return value
        text = isinstance(value, str) and bool(value) and (self.many or Step in self.kinds or value == self.about.word)
        return self.read(list(map(str, value)) if names else value, "recipe") if names or text else value

    def check(self, value: Any) -> None:
        """Raise UserError for a value without a meaning."""
        about = self.about
        items = value if isinstance(value, (tuple, list)) else None
        fits = items is not None if self.many else self._is_of(value, *self.kinds)
        if not fits or not all(self._is_of(item, *self.kinds) for item in items or ()):
            raise UserError(f"{self.name} must be {self._expected}, got {shown(value)}")
        if self.many or isinstance(value, Step) or value is None:
            return
        fits = value in self.choices if self.choices else self._lies_within(value)
        if not fits:
            hint = near(str(value), self.values)
            raise UserError(about.wrong(value) if about.wrong else f"{self._rule}, got {shown(value)}{hint}")

    def plain(self, value: Any) -> Any:
        """What a file holds for the value."""
        if isinstance(value, (tuple, list)):
            return [self.plain(item) for item in value]
        if value is None:
            return self.about.word or None
        return str(value) if isinstance(value, Step) else value

    @property
    def _expected(self) -> str:
        if self.many:
            return "a list of names" if Step in self.kinds else "a list of patterns"
        names = ["int or float" if kind is float else kind.__name__ for kind in self.kinds]
        return " or ".join(name for name in names if name not in ("Step", "NoneType")) or "str"

    @property
    def _rule(self) -> str:
        least, most, name = self.about.least, self.about.most, self.name
        if self.choices:
            return f"{name} takes {self.takes}"
        if self.about.positive:
            return f"{name} must be a positive number"
        if least is None or most is None:
            return f"{name} must be at least {least}" if most is None else f"{name} must be at most {most}"
        return (
            f"{name} must lie between {least} and {most}"
            if float in self.kinds
            else f"{name} must be {least} to {most}"
        )

    def _lies_within(self, value: Any) -> bool:
        about = self.about
        if value in about.besides or isinstance(value, (str, bool)):
            return True
        within = (about.least is None or value >= about.least) and (about.most is None or value <= about.most)
        return within and (not about.positive or 0 < value < math.inf)

    @staticmethod
    def _is_of(value: Any, *kinds: type) -> bool:
        """A bool is no number here; an integer is one."""
        if isinstance(value, bool):
            return bool in kinds
        return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def settings(declared: type) -> dict[str, Setting]:
    """The settings that the fields of a dataclass declare, by name, in order."""
    hints = typing.get_type_hints(declared, include_extras=True)
    return {own.name: _setting(own.name, hints[own.name], own.default) for own in fields(declared)}


def _setting(name: str, hint: Any, default: Any) -> Setting:
    kind, about = typing.get_args(hint)
    many = typing.get_origin(kind) is tuple
    parts = _parts(typing.get_args(kind)[0] if many else kind)
    choices = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    kinds = [type(choice) for choice in choices] + [part for part in parts if isinstance(part, type)]
    return Setting(name, about, default, tuple(dict.fromkeys(kinds)), tuple(choices), many)


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def shown(value: Any) -> str:
    """A value of a file for a message, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def table(declared: type, **words: str) -> str:
    """The settings of a dataclass as a table of documentation, in Markdown."""
    lines = ["| key | option | values | default | what |", "|---|---|---|---|---|"]
    for own in settings(declared).values():
        options = [own.option, *([own.about.opposite[0]] if own.about.opposite else [])]
        default = f"`{own.default_text}`" if own.default_text else ""
        what = own.about.told.replace(" (default: {default})", "").format(default=own.default_text, **words)
        cells = [f"`{own.name}`", ", ".join(f"`{option}`" for option in options), _values(own), default, what]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _values(own: Setting) -> str:
    if own.many:
        return "names" if Step in own.kinds else "patterns"
    if own.choices or Step in own.kinds:
        return own.takes
    about = own.about
    within = f"at least {about.least}" if about.most is None else f"{about.least} to {about.most}"
    numbers = "above 0" if about.positive else f"{within}{''.join(f', or {other}' for other in about.besides)}"
    named = {bool: "true or false", str: "a name"}.get(own.kinds[0], numbers)
    return f"{named} or {about.word}" if about.word else named
