"""The population: every place of a source where one small fault can be planted, by cosmic-ray's operators.

Of the operators that swap a sign for each of eleven others, one a sign: most of the rest raise at once wherever the
line runs, and would only flatter the share. A comparison moves by its boundary (`AddNot` turns it round).
Left out by rule, since no test can or should see them:
- types: annotations, and aliases of types (a name in CamelCase at the top of a module);
- `assert`: it fails by no input;
- what an error says behind `raise`: tests read it where it says what to do, not each number in it;
- caches: without them the same comes out, later;
- the last output in place of the first: nearly all nodes have one;
- what forbids and computes nothing: flags of `dataclass` (frozen, slots), `abstractmethod`, `overload`, the flags
  `safe` (of a removal from a graph) and `strict` (of zip).
"""

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

_SIGNS = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul RShift_LShift LShift_RShift"
_SIGNS += " BitOr_BitAnd BitAnd_BitOr BitXor_BitAnd"
_COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in _SIGNS.split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in _COMPARISONS.split()),
    *(f"ReplaceUnaryOperator_Delete_{sign}" for sign in ("USub", "Invert", "Not")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer"),
    *("RemoveDecorator", "ZeroIterationForLoop"),
)
# The parents of a sign between two terms, in parso's names: elsewhere * and / are no operators.
_TERMS = {"arith_expr", "term", "expr", "and_expr", "xor_expr", "shift_expr", "power"}
_QUIET_DECORATORS = {"cache", "lru_cache", "abstractmethod", "overload", "override"}

Position = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """One fault. path: within the repository. occurrence: the number of the operator's place in the file.

    start, stop: line and column of what it changes. lines: first and last one of the statement;
    None outside of functions, and in ONNX functions, where an import runs it.
    """

    path: str
    operator: str
    occurrence: int
    start: Position
    stop: Position
    lines: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.path}:{self.start[0]} {self.operator}"

    @property
    def place(self) -> tuple[str, Position, Position]:
        """What other mutants of the same characters share."""
        return self.path, self.start, self.stop

    def source(self, text: str) -> str:
        """The file with the fault."""
        return str(mutate_code(text, _operator(self.operator), self.occurrence))

    def changed(self, text: str) -> list[str]:
        """The lines that differ, those before with "-", those after with "+"."""
        found = difflib.unified_diff(text.splitlines(), self.source(text).splitlines(), n=0, lineterm="")
        return [line[0] + line[1:].strip() for line in list(found)[2:] if not line.startswith("@@")]


@cache
def _operator(name: str) -> Any:
    return get_operator(f"core/{name}")()


def mutants(path: str, text: str) -> Iterator[Mutant]:
    """All mutants of a file that the rules leave."""
    tree = ast.parse(text)
    quiet, statement = list(_quiet(tree)), _statements(tree)
    count = dict.fromkeys(OPERATORS, 0)
    for node in ast_nodes(get_ast(text)):
        for name in OPERATORS:
            for start, end in _operator(name).mutation_positions(node):
                number, count[name] = count[name], count[name] + 1
                if name.startswith("ReplaceBinary") and node.parent.type not in _TERMS:
                    continue
                if name == "NumberReplacer" and number % 2 and _first_output(node):  # odd ones are one less
                    continue
                if not any(first <= start and end <= last for first, last in quiet):
                    yield Mutant(path, name, number, start, end, statement.get(start[0]))


def _first_output(number: Any) -> bool:
    """Whether a number is the 0 of `outputs[0]`."""
    leaves = [number]
    while len(leaves) < 3 and leaves[-1] is not None:
        leaves.append(leaves[-1].get_previous_leaf())
    return [leaf and leaf.value for leaf in leaves] == ["0", "[", "outputs"]


def _statements(tree: ast.Module) -> dict[int, tuple[int, int]]:
    """By line of a function's body: first and last line of its innermost statement, up to the body that it may have.

    A decorator's are those of the body: who runs that can see what becomes of it.
    """
    found = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if any(_name(own) == "script" for own in function.decorator_list):
            continue  # an ONNX function, which onnxscript reads as it is imported
        first, last = function.body[0].lineno, function.end_lineno or 0
        found.update((line, (line, line)) for line in range(first, last + 1))
        found.update((own.lineno, (first, last)) for own in function.decorator_list)
    for node in ast.walk(tree):  # outer ones come first
        if isinstance(node, ast.stmt) and node.lineno in found:
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            found.update(dict.fromkeys(range(node.lineno, last + 1), (node.lineno, last)))
    return found


def _quiet(tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    """Where no fault is planted: (first, last) line and column, as parso counts them."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _names_type(node.targets[0].id):
            yield _span(node)
    for node in ast.walk(tree):
        match node:
            case ast.arg(annotation=kept) | ast.AnnAssign(annotation=kept) if kept is not None:
                yield _span(kept)
            case ast.Assert():
                yield _span(node)
            case ast.keyword(arg="safe" | "strict", value=flag):
                yield _span(flag)
            case ast.Raise(exc=ast.Call() as call):
                yield _span(call)
            case ast.FunctionDef(returns=returns, decorator_list=decorators):
                yield from [] if returns is None else [_span(returns)]
                yield from (_decorator(d) for d in decorators if _name(d) in _QUIET_DECORATORS)
            case ast.ClassDef(decorator_list=decorators):
                yield from (_span(d) for d in decorators if _name(d) == "dataclass")


def _names_type(name: str) -> bool:
    return bool(re.fullmatch(r"_?[A-Z]+[a-z]\w*|[A-Z]", name))


def _name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _span(node: ast.stmt | ast.expr) -> tuple[Position, Position]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _decorator(node: ast.expr) -> tuple[Position, Position]:
    """From its @ to the beginning of the next line, as parso has them."""
    first, last = _span(node)
    return (first[0], 0), (last[0] + 1, 0)


def population(root: Path) -> list[Mutant]:
    """Of all files of passes/, in order."""
    files = sorted((root / "passes").rglob("*.py"))
    return [one for path in files for one in mutants(path.relative_to(root).as_posix(), path.read_text("utf-8"))]
