"""Items from packages: sums and sequences that reasoning-gym generates, and the examples in numpy's documentation."""

import doctest
import inspect
from collections.abc import Callable, Iterator
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np

from qcompile.compiler.measure.tasks.items import CHOICES, Item, item
from qcompile.passes.errors import UserError

# Solved ones before each sum, so that models without instructions know what is asked.
_SOLVED = 4
# How far choices are apart that are numbers.
_APART = (1, 2, 3, 10)
# Characters of an example's answer, and of what stands before it.
_ANSWER, _EXAMPLE = (2, 40), 600
# Answers of others among which the wrong ones are those about as long.
_DRAWN = 40


def arithmetic(count: int) -> list[Item]:
    """Sums and differences of two or three numbers of one or two digits, behind solved ones; near numbers are wrong."""
    random = Random("arithmetic")
    terms = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    sums = list(
        _generated("chain_sum", count + _SOLVED, lambda own: str(own["metadata"]["expression"]), **terms).items()
    )
    solved = "".join(f"{left} = {right}\n" for left, right in sums[:_SOLVED])
    return [item(f"{solved}{left} =", f" {right}", _near(right, random), random) for left, right in sums[_SOLVED:]]


def pattern(count: int) -> list[Item]:
    """The number that goes on with a sequence; near numbers are wrong."""
    random = Random("pattern")
    sequences = _generated(
        "number_sequence", count, lambda own: str(own["question"]).rstrip(" ?"), max_value=99, min_value=-99
    )
    return [item(own, f" {right}", _near(right, random), random) for own, right in sequences.items()]


def code(count: int) -> list[Item]:
    """What an expression shows, from the examples in the documentation of numpy, behind those before it there."""
    random, found = Random("code"), dict(_examples())  # some functions have two names
    answers, items = sorted(found.values()), []  # as often as they come: what is common is no more often right
    for context, answer in random.sample(sorted(found.items()), min(count, len(found))):
        nearest = sorted(random.sample(answers, min(_DRAWN, len(answers))), key=lambda own: abs(len(own) - len(answer)))
        wrong = [own for own in dict.fromkeys(nearest) if own != answer][: CHOICES - 1]
        items.append(item(context, answer, wrong, random))
    return items


def _examples() -> Iterator[tuple[str, str]]:
    """(all up to an example's answer, the answer), of functions of numpy that show answers of one line."""
    parser = doctest.DocTestParser()
    for name in sorted(np.__all__):
        own = getattr(np, name, None)
        if not callable(own) or inspect.isclass(own):
            continue
        try:
            parts = parser.get_examples(inspect.getdoc(own) or "")
        except ValueError:  # documentation that is no doctest
            continue
        before = ""
        for part in parts:
            before += ">>> " + "\n... ".join(part.source.rstrip("\n").split("\n")) + "\n"
            answer = part.want.rstrip("\n")
            if _ANSWER[0] <= len(answer) <= _ANSWER[1] and "\n" not in answer and len(before) <= _EXAMPLE:
                yield before, answer
            before += part.want


def _near(right: int, random: Random) -> list[str]:
    """Wrong numbers such that the right one may be any of all by size, so that nothing about them tells which."""
    numbers = list(accumulate(random.sample(_APART, CHOICES - 1), initial=0))
    own = random.choice(numbers)
    return [f" {right + number - own}" for number in numbers if number != own]


def _generated(name: str, count: int, asked: Callable[[Any], str], **settings: Any) -> dict[str, int]:
    """Answers by what is asked, the first `count` that differ; no more are made, for some take half a minute."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "tasks arithmetic and pattern need reasoning-gym: pip install 'qcompile-onnx[tasks]'"
        ) from error
    size, found = 2 * count + 8, dict[str, int]()  # some come twice
    made = reasoning_gym.create_dataset(name, seed=0, size=size, **settings)
    for index in range(size):
        own = made[index]
        found.setdefault(asked(own), int(own["answer"]))
        if len(found) == count:
            break
    return found
