"""What a program is told: messages name options, as the command line has them; here they name keywords.

Every message is worded once, for the command line. The functions of `import qcompile` pass through `door`, which words
what leaves them for their own keywords; options that are none of these (of another command, say) stay as they are.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from qcompile.compiler.api.fields import Fields
from qcompile.passes import lists
from qcompile.passes.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
# Keywords that are not called as their options are.
_OTHERS = {"eval_data": "evaluation", "shape": "shapes"}
_WORDS = "self|norms|native|portable|module:function"
_NUMBER = r"-?\d[\d.]*(?:e[+-]?\d+)?%?"
_METAVAR = r"[A-Z]{1,9}(?:\.\w+)?(?: ?…)?(?![\w.])"
_PATH = r"[^\s,;:()`]*[./\\][^\s,;:()`]*[^\s,;:()`.…]"
# A list of passes: a comma in it, or the shortest one that is advised.
_LIST = r"[a-z_]+(?:\([^()]*\))?(?:,[a-z_]+(?:\([^()]*\))?)+" + rf"|{lists.PLAIN}\b"
_OPTION = re.compile(
    rf"(?<![\w-])--(?P<name>[a-z][a-z0-9-]*)(?P<colon>:)?"
    rf"(?:[ =](?:(?P<number>{_NUMBER})(?![\w])|(?P<metavar>{_METAVAR})|(?P<text>(?:{_WORDS})\b|{_LIST}|{_PATH})))?"
)
_SHAPE = re.compile(r"(?<![\w-])--shape ([^\s=:]+)=([^\s]+)")
_OUTPUT = re.compile(r"(?<!\S)-o(?: (?:DIR|FILE))?(?![\w-])")


def worded(text: str, keywords: Collection[str]) -> str:
    """A message with keywords in the place of options: `--max-kl 0.1` is max_kl=0.1. Commands in backticks stay.

    "The same command" of a program is the same call.
    """

    def keyword(found: re.Match[str]) -> str:
        name = found["name"].replace("-", "_")
        name = _OTHERS.get(name, name)
        if name not in keywords:
            return found[0]
        if found["colon"]:
            return f"{name}:"
        value = found["text"] or found["number"] or ""
        quoted = f'"{value}"' if found["text"] or value.endswith("%") else value
        return f"{name}={quoted}{'…' if found['metavar'] else ''}"

    parts = text.split("`")
    for number in range(0, len(parts), 2):
        if "shapes" in keywords:
            parts[number] = _SHAPE.sub(r'shapes={"\1": (\2)}', parts[number])
        parts[number] = _OPTION.sub(keyword, parts[number])
        if "output" in keywords:
            parts[number] = _OUTPUT.sub("output=", parts[number])
        if keywords:
            parts[number] = parts[number].replace("the same command", "the same call")
    return "`".join(parts)


def keywords_of(function: Callable[..., object]) -> frozenset[str]:
    """The keywords that a public function takes, those of a recipe's settings among them."""
    found = inspect.signature(function).parameters.values()
    more = Fields.__annotations__ if any(own.kind is own.VAR_KEYWORD for own in found) else ()
    return frozenset((*(own.name for own in found), *more))


def door(function: Callable[P, T]) -> Callable[P, T]:
    """A public function whose errors name its keywords, and so do the notes of whatever it raises."""

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            known = keywords_of(function)
            if isinstance(error, UserError):
                error.args = (worded(str(error), known), *error.args[1:])
            if hasattr(error, "__notes__"):
                error.__notes__ = [worded(note, known) for note in error.__notes__]
            raise

    return entered
