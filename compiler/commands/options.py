"""Options that several commands have, those of a recipe's settings among them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.compiler.recipe import SETTINGS, Recipe, Step, load_recipe
from qcompile.compiler.settings.setting import Setting
from qcompile.passes.formats import FORMATS


def add_custom_ops(add: Callable[..., Any]) -> None:
    """Add --custom-ops; the command line has its libraries registered around the whole command."""
    told = "a library of custom operators that the model needs (a .so, .dylib or .dll: its code runs); may repeat"
    add("--custom-ops", type=Path, action="append", default=[], metavar="FILE", help=told)


def add_data(add: Callable[..., Any], told: str, metavar: str = "FILE") -> None:
    """--data: files of inputs that models are scored on."""
    add("--data", nargs="+", action="extend", type=Path, default=[], metavar=metavar, help=told)


def add_recipe(add: Callable[..., Any]) -> None:
    """--recipe: what the options of settings stand before."""
    add("--recipe", type=Path, metavar="FILE", help="settings from a YAML or TOML file; options given here win")


def add_settings(group: Any, *headings: str) -> None:
    """Add the options of all settings of a recipe that are declared under these headings to an argument group."""
    for own in SETTINGS.values():
        if own.about.group in headings:
            _add(group, own)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe file's settings, overridden by the options given."""
    plain = (load_recipe(args.recipe) if args.recipe else Recipe()).to_dict()
    given = {name: getattr(args, name, None) for name in SETTINGS}
    return Recipe.from_dict(plain | {name: value for name, value in given.items() if value is not None}, "options")


def _add(group: Any, own: Setting) -> None:
    """The option of a setting; None where it is not given."""
    told = own.told(formats=", ".join(known.name for known in FORMATS)).replace("%", "%%")
    if own.about.opposite is not None:
        pair, (other, otherwise) = group.add_mutually_exclusive_group(), own.about.opposite
        pair.add_argument(own.option, action="store_true", default=None, help=told)
        pair.add_argument(other, dest=own.name, action="store_false", default=None, help=otherwise)
    elif own.many and Step not in own.kinds:
        group.add_argument(own.option, action="append", metavar=own.about.metavar, help=told)
    elif own.kinds == (str,) and own.choices:
        group.add_argument(own.option, choices=own.choices, help=told)
    else:
        metavar = own.about.metavar or f"{{{','.join(own.values)}}}"
        group.add_argument(own.option, type=_type(own), metavar=metavar, help=told)


def _type(own: Setting) -> Callable[[str], Any]:
    """What makes a file's plain value of an option's text."""
    words = own.about.word or Step in own.kinds
    if own.many or not words or own.kinds[0] in (str, Step):
        return {int: int, float: float}.get(own.kinds[0], str)
    return lambda text: _named(own, text)


def _named(own: Setting, text: str) -> Any:
    """The same where some values have names."""
    if text == own.about.word or (Step in own.kinds and text[:1].isalpha()):
        return text
    by_name = {str(choice): choice for choice in own.choices}
    try:
        return by_name[text] if by_name else own.kinds[0](text)
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected {own.takes}, got {text!r}") from error
