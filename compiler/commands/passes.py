"""`qcompile passes`: what can stand in a pass list, and the observers and weight formats that a recipe can name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from qcompile.compiler.commands.declared.passes import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.terminal import console
from qcompile.compiler.plan import describe, needs_calibration, summary
from qcompile.passes.base import Pass
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import Table, parameters
from qcompile.passes.formats import BY_NAME
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.table import PASSES

T = TypeVar("T")
# Letters of a line that has the parameters, too.
_WIDE = 100


def run(args: Options) -> Document:
    """Print each pass, in the order in which a full list runs them; then each observer, and each format. Or one pass.

    Raises UserError behind the lists where a row of another package cannot be used, and for a pass that there is not.
    """
    screen, wrong = console(answer=True, markup=True), list[str]()
    if args.name is not None:
        kind = PASSES.required(args.name)
        _print_pass(screen, args.name, kind)
        _print_parts(screen, args.name, kind.parts)
        return {"passes": _told([(args.name, kind)])}
    for name, kind in _rows(PASSES, wrong):
        _print_pass(screen, name, kind)
        if kind.parts:
            told = f"{len(kind.parts)} small passes; `qcompile passes {name}` lists them"
            screen.print(f"{'':{max(map(len, PASSES))}} {told}", soft_wrap=True, markup=False)
    _print_below(screen, 'example  --passes "smooth(alpha=0.5),awq,gptq,pack"')
    _print_below(screen, "observers of activation ranges")
    for name, observer in _rows(OBSERVERS, wrong):
        if observer.calibrates:
            _print(screen, OBSERVERS, name, observer, {})
    _print_below(screen, 'example  --passes "smooth,qdq(observer=mse)"')
    _print_below(screen, "weight formats")
    for name, own in _rows(BY_NAME, wrong):
        _print(screen, BY_NAME, name, type(own), parameters(own.grid))
    _print_below(screen, 'example  --weights "int4(group=64)"')
    if wrong:
        raise UserError("; ".join(wrong))
    formats = [
        {"name": name, "told": summary(type(own)), "parameters": _plain(own.grid)} for name, own in BY_NAME.items()
    ]
    return {"passes": _told(PASSES.items()), "observers": _told(OBSERVERS.items()), "formats": formats}


def _print_below(screen: Console, text: str) -> None:
    """A line with an empty one before it: a line end within a text is shown as what it is (`visible`)."""
    screen.print()
    screen.print(text, markup=False)


def _told(rows: Iterable[tuple[str, type]]) -> list[dict[str, Any]]:
    """Rows of a table as plain values."""
    return [
        {"name": name, "told": summary(kind), "parameters": _plain(kind), "parts": dict(getattr(kind, "parts", {}))}
        for name, kind in rows
    ]


def _plain(kind: Any) -> dict[str, str]:
    """Parameters by name, as a list of passes is given them."""
    return {name: describe({name: own}) for name, own in parameters(kind).items()}


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
    told, given = f"[bold]{name:<{width}}[/bold] {escape(summary(kind))}", describe(known) if known else ""
    beside = bool(given) and width + len(summary(kind)) + len(notes) + len(given) < _WIDE
    told = f"{told} [dim]{escape(notes)}[/dim]" if notes else told
    console.print(f"{told} {escape(f'({given})')}" if beside else told, soft_wrap=True)
    if given and not beside:
        console.print(f"{'':{width}} {given}", soft_wrap=True, markup=False)


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
