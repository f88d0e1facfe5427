"""What commands print with: tables that survive a pipe, progress bars with the time left."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qcompile.compiler.console.visible import visible

# Into a file or a pipe nothing is cut or wrapped, however long a node's name is.
_PIPE_WIDTH = 10_000


class _Console(Console):
    """Every string that is printed, a table's cells too, is one line whose characters all show."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as rich prints it, which would let escape sequences through."""
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to the command line, instead of rich's exit code 1."""
        raise BrokenPipeError


def console() -> Console:
    """A console on stdout; as wide as it takes where that is no terminal."""
    return _Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)


def table(*columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are aligned to the right; names fold instead of being cut."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        right = index >= len(columns) - numbers
        made.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return made


def progress() -> Progress:
    """A bar on stderr with steps done and time left; silent where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
