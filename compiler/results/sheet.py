"""Results as a short table: on a terminal, in a notebook, as plain values and as a pandas DataFrame."""

import html
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from qcompile.compiler.console.terminal import table
from qcompile.compiler.console.visible import visible
from qcompile.passes.errors import UserError

_WIDTH = 200


@dataclass(frozen=True)
class Sheet:
    """A title, a table (numbers: how many of its last columns are such), and lines below."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: int = 0
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal, without a line end behind it."""
        out = io.StringIO()
        console = Console(  # in a notebook, too: rich would display there by itself
            file=out, width=_WIDTH, color_system=None, highlight=False, markup=False, force_jupyter=False
        )
        self.show(console)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def show(self, console: Console) -> None:
        """On a console."""
        made = table(*self.heads, numbers=self.numbers)
        for row in self.rows:
            made.add_row(*map(visible, row))
        parts = [*filter(None, [visible(self.title)]), *([made] if self.rows else []), *map(visible, self.notes)]
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))

    def html(self) -> str:
        """For a notebook; what comes from a model is escaped."""

        def shown(text: str) -> str:
            return html.escape(visible(text))

        left = len(self.heads) - self.numbers
        heads = "".join(f"<th style='text-align:left'>{shown(head)}</th>" for head in self.heads)
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:{'left' if at < left else 'right'}'>{shown(cell)}</td>"
                for at, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        body = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if self.rows else ""
        return f"<p>{shown(self.title)}</p>{body}" + "".join(f"<p>{shown(note)}</p>" for note in self.notes)


class Shown(ABC):
    """Results that print as a short table, and give all they hold as plain values."""

    @abstractmethod
    def sheet(self) -> Sheet:
        """The short table."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, as in the JSON file or output of the command."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows of the DataFrame."""

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame; UserError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_dataframe needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.records())

    def __str__(self) -> str:
        return self.sheet().text()

    def __repr__(self) -> str:
        return self.sheet().text()

    def _repr_html_(self) -> str:
        return self.sheet().html()
