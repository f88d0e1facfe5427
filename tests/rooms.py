"""The rooms of compiler/, the floors they stand on, and who imports whom: the table in docs/architecture.md.

python tests/rooms.py
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether inside a function) of every import; a relative one as its dots.

    What is imported from `qcompile` or from one of its four folders may be a module as well as a member, and is told
    with its name.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            deeper = module.split(".")[0] == "qcompile" and module.count(".") < 2
            yield from ((node.lineno, f"{module}.{a.name}" if deeper else module, inside) for a in node.names)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, inside=inside or function)


def rooms(root: Path = ROOT) -> dict[str, set[str]]:
    """By room, a folder or a module at the top of compiler/: the other rooms that it imports, in functions or not."""
    top = root / "compiler"
    found: dict[str, set[str]] = {}
    for path in sorted(top.rglob("*.py")):
        room = path.relative_to(top).with_suffix("").parts[0]
        if room != "__init__":
            modules = (module.split(".") for _, module, _ in imports(ast.parse(path.read_text())))
            used = {parts[2] for parts in modules if parts[:2] == ["qcompile", "compiler"] and len(parts) > 2}
            found[room] = found.get(room, set()) | used - {room}
    return {room: {other for other in used if other in found} for room, used in found.items()}


def floors(house: Mapping[str, set[str]]) -> dict[str, int]:
    """By room: one floor above the highest room that it imports; ValueError where there is a circle."""
    found: dict[str, int] = {}
    while len(found) < len(house):
        ready = {room for room, used in house.items() if room not in found and used <= found.keys()}
        if not ready:
            raise ValueError(f"rooms that import each other: {', '.join(sorted(house.keys() - found.keys()))}")
        found |= {room: max((found[other] + 1 for other in house[room]), default=0) for room in ready}
    return found


def table(root: Path = ROOT) -> str:
    """The house from the top floor down, in Markdown; what a room is for is the first line of its docstring."""
    house = rooms(root)
    height = floors(house)
    lines = ["| floor | room | | imports |", "|---|---|---|---|"]
    for room in sorted(house, key=lambda room: (-height[room], room)):
        folder = root / "compiler" / room
        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        told = (ast.get_docstring(ast.parse(source.read_text())) or "").splitlines()[0]
        name = f"`{room}/`" if folder.is_dir() else f"`{room}.py`"
        used = sorted(house[room], key=lambda other: (-height[other], other))
        lines.append(f"| {height[room]} | {name} | {told} | {', '.join(used)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
