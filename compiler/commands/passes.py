"""`qcompile passes`: what can stand in a pass list, and the observers and weight formats that a recipe can name."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from rich.console import Console
from rich.markup import escape

from qcompile.compiler.commands.options import Common, command, positional
from qcompile.compiler.plan import describe, needs_calibration, summary
from qcompile.passes.base import Pass
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import Table, parameters
from qcompile.passes.formats import BY_NAME
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.table import PASSES

T = TypeVar("T")


@command()
class Options(Common):
    """The passes, the observers (for qdq(observer=NAME)) and the weight formats (for --weights NAME), with their
    parameters; those of other packages with the package that adds them."""

    name: Annotated[str | None, positional("PASS", "this one alone, with the small passes that it is made of")] = None


def run(args: Options) -> int:
    """Print each pass, in the order in which a full list runs them; then each observer, and each format. Or one pass.

    Raises UserError behind the lists where a row of another package cannot be used, and for a pass that there is not.
    """
    console, wrong = Console(highlight=False), list[str]()
    if args.name is not None:
        kind = PASSES.required(args.name)
        _print_pass(console, args.name, kind)
        _print_parts(console, args.name, kind.parts)
        return 0
    for name, kind in _rows(PASSES, wrong):
        _print_pass(console, name, kind)
        if kind.parts:
            told = f"{len(kind.parts)} small passes; `qcompile passes {name}` lists them"
            console.print(f"{'':{max(map(len, PASSES))}} {told}", soft_wrap=True, markup=False)
    console.print('\nexample  --passes "smooth(alpha=0.5),awq,gptq,pack"', markup=False)
    console.print("\nobservers of activation ranges")
    for name, observer in _rows(OBSERVERS, wrong):
        if observer.calibrates:
            _print(console, OBSERVERS, name, observer, {})
    console.print('\nexample  --passes "smooth,qdq(observer=mse)"', markup=False)
    console.print("\nweight formats")
    for name, own in _rows(BY_NAME, wrong):
        _print(console, BY_NAME, name, type(own), parameters(own.grid))
    console.print('\nexample  --weights "int4(group=64)"', markup=False)
    if wrong:
        raise UserError("; ".join(wrong))
    return 0


def _rows(table: Table[T], wrong: list[str]) -> Iterator[tuple[str, T]]:
    """The rows that can be used; what is wrong with the others joins `wrong`."""
    for name in table:
        try:
            row = table[name]
        except UserError as error:
            wrong.append(str(error))
        else:
            yield name, row


def _print_pass(console: Console, name: str, kind: type[Pass]) -> None:
    _print(console, PASSES, name, kind, parameters(kind), "(needs calibration)" if needs_calibration(kind) else "")


def _print(
    console: Console, table: Table[Any], name: str, kind: type, known: Mapping[str, Any], note: str = ""
) -> None:
    outside, width = table.origin(name), max(map(len, table))
    notes = " ".join(filter(None, [note, f"(from {outside})" if outside else ""]))
    told = f"[bold]{name:<{width}}[/bold] {escape(summary(kind))}"
    console.print(f"{told} [dim]{escape(notes)}[/dim]" if notes else told, soft_wrap=True)
    if known:
        console.print(f"{'':{width}} {describe(known)}", soft_wrap=True, markup=False)


def _print_parts(console: Console, name: str, parts: Mapping[str, str]) -> None:
    """The small passes of a pass, if it has any."""
    if not parts:
        return
    first, second, *_ = parts
    indent, width = " " * max(map(len, PASSES)), max(map(len, parts))
    told = f"its small passes, in order; {name}(without={first}+{second}) switches these two off:"
    console.print(f"{indent} {told}", soft_wrap=True, markup=False)
    for part, line in parts.items():
        console.print(f"{indent}   {part:<{width}}  {line}", soft_wrap=True, markup=False)
