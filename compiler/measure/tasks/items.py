"""An item of a task: a context, answers that may follow it, and which of them is right."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

# Answers of an item, the right one among them.
CHOICES = 4


@dataclass(frozen=True)
class Item:
    """context: what the model reads. choices: texts that may follow it as they are. answer: which of them is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def item(context: str, right: str, wrong: Sequence[str], random: Random) -> Item:
    """An item whose choices stand in random order; ValueError where two of them are the same."""
    choices = [right, *wrong]
    if len(set(choices)) < len(choices):
        raise ValueError(f"choices that are the same: {choices}")
    random.shuffle(choices)
    return Item(context, tuple(choices), choices.index(right))


def digest(items: Sequence[Item]) -> str:
    """What tells one set of items from another: 12 hexadecimal digits of the sha256 of all that they say."""
    return hashlib.sha256(repr(tuple(items)).encode()).hexdigest()[:12]
