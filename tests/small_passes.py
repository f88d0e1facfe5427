"""The small passes of `prepare` in their order: the table in docs/prepare.md.

python tests/small_passes.py
"""

from collections.abc import Iterator

from qcompile.passes.prepare.order import ORDER, SMALL, Small


def table() -> str:
    """One row a small pass: what it does, behind which it stands and why, where else it runs, and what relies on it."""
    lines = ["| small pass | what it does | where it stands | where it cannot be left out |", "|---|---|---|---|"]
    for small in SMALL.values():
        row = (f"`{small.name}`", small.summary, "; ".join(_places(small)), small.ground)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def _places(small: Small) -> Iterator[str]:
    if small.only_after:
        yield f"where {_either(small.only_after)} changed a node"
    for earlier, why in small.after.items():
        yield f"behind `{earlier}`: {why}"
    for place, turn in enumerate(ORDER):
        if turn.name == small.name and not isinstance(turn, Small):
            where = f"behind `{ORDER[place - 1].name}`"
            changed = f", where {_either(turn.only_after)} changed a node" if turn.only_after else ""
            yield f"again {where}{changed}: {turn.why}"


def _either(names: object) -> str:
    assert isinstance(names, tuple)
    return " or ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(table())
