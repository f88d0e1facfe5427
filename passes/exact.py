"""Exact names: a weight called by its very name in double quotes, as JSON has them, where a pattern may stand.

Whatever is in a name, it means nothing so: stars, brackets, spaces, "=", and it is no operator's or node's.
"""

import json


def quoted(name: str) -> str:
    """The pattern that fits the weight of this very name alone."""
    return json.dumps(name, ensure_ascii=False)


def unquoted(pattern: str) -> str | None:
    """The name that a quoted pattern says; None for one of the shell's."""
    name, rest = split_quoted(pattern)
    return name if not rest else None


def split_quoted(text: str) -> tuple[str | None, str]:
    """(the name in quotes that a text begins with, what is behind it); (None, the text) where it begins otherwise."""
    if not text.startswith('"'):
        return None, text
    try:
        name, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None, text
    return str(name), text[end:]
