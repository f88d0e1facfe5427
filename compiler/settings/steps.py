"""Names with parameters, as a recipe gives passes and weight formats: "smooth(alpha=auto),awq,pack"."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile.passes.errors import UserError
from qcompile.passes.exact import quoted, split_quoted

_ITEM = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\(([^()]*)\))?\s*$")


@dataclass(frozen=True)
class Step:
    """One pass of the list, with the parameters given to it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{key}={_scalar(value)}" for key, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name


def parse_step(text: str, whole: str = "") -> Step:
    """One name with its parameters, such as "smooth(alpha=auto)". whole: what it was taken from, for a message."""
    match = _ITEM.match(text)
    if match is None:
        raise UserError(f"cannot read {text.strip()!r} in {whole or repr(text)}: expected name or name(key=value, …)")
    pairs = [_pair(part, whole or repr(text)) for part in (match[2] or "").split(",") if part.strip()]
    if len(parameters := dict(pairs)) < len(pairs):
        raise UserError(f"cannot read {text.strip()!r} in {whole or repr(text)}: a parameter is there twice")
    return Step(match[1], parameters)


def parse_named(text: str, word: str, whole: str) -> tuple[str, Step | None]:
    """(pattern, what is for the names that it fits) of "PATTERN=NAME(key=value, …)"; None where that is the word.

    A pattern may be a name in quotes (`passes.exact`). whole: what it was taken from, for a message.
    """
    name, rest = split_quoted(text.strip())
    before, equals, given = rest.partition("=")
    pattern = before if name is None else quoted(name)
    if name is not None and before.strip():
        raise UserError(f"{whole}: cannot read {text!r}: '=' must stand behind the name in quotes")
    if not equals or not pattern.strip() or not given.strip():
        raise UserError(f"{whole}: cannot read {text!r}: expected PATTERN=FORMAT, such as '*down_proj*=int8'")
    return pattern.strip(), None if given.strip() == word else parse_step(given, whole)


def parse_passes(text: str) -> tuple[Step, ...]:
    """The steps of a list such as "smooth(alpha=auto),awq,pack(target=qdq)"."""
    return tuple(parse_step(item, f"the pass list {text!r}") for item in split_list(text))


def split_list(text: str) -> list[str]:
    """The items of a list with commas between them, of which some may stand in an item's parentheses."""
    return re.split(r",(?![^(]*\))", text)


def _pair(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise UserError(f"cannot read {text.strip()!r} in {whole}: expected key=value")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """true or false, an integer, a number (1e-3 too, which YAML takes for a word), or else a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
