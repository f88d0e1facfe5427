"""Items from packages: sums and sequences that reasoning-gym generates, and the examples in numpy's documentation."""

import doctest
import inspect
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from qcompile.compiler.measure.tasks.items import CHOICES, Item, item
from qcompile.passes.errors import UserError

# Solved ones before each sum, so that models without instructions know what is asked.
_SOLVED = 4
# How far wrong numbers are from the right one.
_OFF = (-10, -3, -2, -1, 1, 2, 3, 10)
# Characters of an example's answer, and of what stands before it.
_ANSWER, _EXAMPLE = (2, 40), 600


def arithmetic(count: int) -> list[Item]:
    """Sums and differences of two or three numbers of one or two digits, behind solved ones; near numbers are wrong."""
    random = Random("arithmetic")
    made = _generated("chain_sum", count + _SOLVED, min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    (*sums,) = {str(own["metadata"]["expression"]): int(own["answer"]) for own in made}.items()
    solved = "".join(f"{left} = {right}\n" for left, right in sums[:_SOLVED])
    return [
        item(f"{solved}{left} =", f" {right}", _near(right, random), random)
        for left, right in sums[_SOLVED : _SOLVED + count]
    ]


def pattern(count: int) -> list[Item]:
    """The number that goes on with a sequence; near numbers are wrong."""
    random = Random("pattern")
    made = _generated("number_sequence", count, max_value=99, min_value=-99)
    sequences = {str(own["question"]).rstrip(" ?"): int(own["answer"]) for own in made}
    return [item(own, f" {right}", _near(right, random), random) for own, right in list(sequences.items())[:count]]


def code(count: int) -> list[Item]:
    """What an expression shows, from the examples in the documentation of numpy, behind those before it there."""
    random, found = Random("code"), dict(_examples())  # some functions have two names
    answers, items = sorted(set(found.values())), []
    for context, answer in random.sample(sorted(found.items()), min(count, len(found))):
        nearest = sorted(random.sample(answers, min(40, len(answers))), key=lambda own: abs(len(own) - len(answer)))
        wrong = [own for own in nearest if own != answer][: CHOICES - 1]
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
    return [f" {right + off}" for off in random.sample(_OFF, CHOICES - 1)]


def _generated(name: str, count: int, **settings: Any) -> list[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "--tasks arithmetic and pattern need reasoning-gym: pip install 'qcompile-onnx[tasks]'"
        ) from error
    return list(reasoning_gym.create_dataset(name, seed=0, size=2 * count + 8, **settings))  # some come twice
