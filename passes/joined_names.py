"""What nodes are called that others became: `layers.0.q_proj+k_proj+v_proj` of several, `….integer` of a product."""

import re
from collections.abc import Sequence, Set

# What the integer product of a node has behind the node's name.
INTEGER = ".integer"


def joined_name(names: Sequence[str]) -> str:
    """One name for several: what they begin with in common, up to a dot or slash, once."""
    parts = [re.split(r"(?<=[./])", name) for name in names]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return "".join(parts[0][:common]) + "+".join("".join(part[common:]) for part in parts)


def parts_of(name: str, known: Set[str]) -> list[str]:
    """The names that `joined_name` made one of, where all of them are known; else the name alone, of the float node."""
    name = name.removesuffix(INTEGER)
    first, *others = name.split("+")
    ends = [end.end() for end in re.finditer(r"[./]", first)]
    for end in [*reversed(ends), 0] if others else ():
        parts = [first, *(first[:end] + other for other in others)]
        if known >= {*parts} and len({*parts}) == len(parts):
            return parts
    return [name]
