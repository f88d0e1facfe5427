"""The grid of a sweep: settings with several values each, and all combinations of them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qcompile.compiler.plan import build, effective, make_policy, needs_calibration
from qcompile.compiler.recipe import SETTINGS, Recipe, split_list
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

CALIBRATION = "calibration"
# Settings that are lists themselves: their alternatives are separated by semicolons. Files of one alternative of
# calibration data have a plus between them.
LISTS = tuple(name for name, own in SETTINGS.items() if own.many)
_JOIN = "+"
_WORDS: dict[tuple[str, Any], Any] = {("group_size", "channel"): 0, ("exclude", "none"): [], ("weights_of", "none"): []}

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Combination:
    """One point of the grid. values: by key, as the grid writes them. calibration: files and words, none for the
    default.

    recipe: None where the settings exclude each other; `reason` then says why.
    """

    values: Mapping[str, str]
    recipe: Recipe | None
    calibration: tuple[str, ...] = ()
    reason: str = ""


def parse_grid(items: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values by key of items such as "bits=4,8" and "passes=pack;smooth,pack"."""
    grid: dict[str, tuple[str, ...]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if key == CALIBRATION and ";" in text:
            raise UserError(f"--grid: {item!r} has semicolons: commas part its values, {_JOIN} the files of one")
        values = [value.strip() for value in (text.split(";") if key in LISTS else split_list(text))]
        if not equals or not all(values):
            raise UserError(f"--grid: cannot read {item!r}: expected KEY=VALUE,VALUE (lists of {LISTS[0]} with ';')")
        if key in grid:
            raise UserError(f"--grid: {key} is given twice: put all its values into one item")
        grid[key] = tuple(dict.fromkeys(values))
    return grid


def combinations(grid: Grid, base: Recipe, calibration: Sequence[str] = ()) -> list[Combination]:
    """Every combination of the grid's values over the base recipe, the last key changing fastest.

    Case 1: a key that is neither a recipe's nor `calibration`, and a value without a meaning, and a budget: UserError.
    Case 2: settings that exclude each other: a combination without a recipe, but with the reason.
    Case 3: a value that every combination refuses: UserError with the first reason.
    """
    if "budget" in grid or base.budget is not None:  # Case 1
        raise UserError("--grid: a sweep spends no budget: leave it out, and vary weights, group_size or weights_of")
    known = [*SETTINGS, CALIBRATION]
    for key, values in grid.items():
        if key not in known:  # Case 1
            raise UserError(f"--grid: unknown key {key!r}; known keys are {', '.join(known)}{near(key, known)}")
        if not values or isinstance(values, str):
            raise UserError(f"--grid: {key} needs a list of values, got {values!r}")
    texts = {key: list(dict.fromkeys(_text(key, value) for value in values)) for key, values in grid.items()}
    if not all(texts.get(CALIBRATION, [CALIBRATION])):
        raise UserError(f"--grid: {CALIBRATION} has an empty value")
    made = [
        _combination(dict(zip(texts, values, strict=True)), base, calibration)
        for values in itertools.product(*texts.values())
    ]
    for key, value in ((key, value) for key, values in texts.items() for value in values):
        reasons = [one.reason for one in made if one.values[key] == value]
        if all(reasons):  # Case 3
            raise UserError(f"--grid: {key}={value} is never possible: {reasons[0]}")
    return made


def identity(recipe: Recipe, calibration: str) -> dict[str, Any]:
    """What of a recipe and of the calibration data (any name of its content) decides the packed weights.

    Case 1: `symmetric` is left out where the weights' specs are the same without it (8 bits).
    Case 2: data, samples and context are left out where no pass reads them, and no sensitivity is measured on them.
        They still choose the inputs of the checks, and so which nodes take int8 activations where that is left to
        qcompile: the first one counts.
    """
    plain = replace(recipe, symmetric=False)
    if make_policy(recipe) == make_policy(plain):  # Case 1
        recipe = plain
    settings = recipe.to_dict() | {CALIBRATION: calibration}
    if not recipe.mixed and not any(needs_calibration(step) for step in build(recipe)):  # Case 2
        for unused in (CALIBRATION, "samples", "context"):
            del settings[unused]
    return settings


def _text(key: str, value: Any) -> str:
    """A value as the command line writes it."""
    if key == "group_size" and value == 0:
        return "channel"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return _JOIN.join(map(str, value)) if key == CALIBRATION else ",".join(map(str, value)) or "none"
    return str(value)


def _combination(values: Mapping[str, str], base: Recipe, calibration: Sequence[str]) -> Combination:
    files = tuple(calibration)
    if CALIBRATION in values:
        files = tuple(_joined(values[CALIBRATION]))
    settings = {key: _value(key, text) for key, text in values.items() if key != CALIBRATION}
    try:
        recipe = effective(Recipe.from_dict(base.to_dict() | settings, "combination"))
        build(recipe)
    except UserError as error:
        return Combination(values, None, files, str(error))  # Case 2
    return Combination(values, recipe, files)


def _joined(text: str) -> list[str]:
    """The files and words that have a plus between them; files may have one in their names."""
    parts, found = text.split(_JOIN), list[str]()
    while parts:
        names = (count for count in range(len(parts), 1, -1) if Path(_JOIN.join(parts[:count])).exists())
        count = next(names, 1)
        found.append(_JOIN.join(parts[:count]).strip())
        parts = parts[count:]
    return found


def _value(key: str, text: str) -> Any:
    """What a recipe file would hold for the text: channel is 0; yes, no and numbers as YAML has them."""
    if (key, text) in _WORDS:
        return _WORDS[key, text]
    if key in LISTS:
        return text if key == "passes" else split_list(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--grid: {key} cannot be {text!r}") from error
