"""What commands print with: answers on stdout, tables that survive a pipe, and how far a job is on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qcompile.compiler.console.visible import visible

# Into a file or a pipe nothing is cut or wrapped, however long a node's name is.
_PIPE_WIDTH = 10_000
# Spaces between columns.
_GAP = 2
# Seconds between lines of progress where stderr is no terminal.
_OFTEN = 15
# (quiet, document): --quiet, and stdout kept for one JSON document.
_VOICE: ContextVar[tuple[bool, bool]] = ContextVar("voice", default=(False, False))


@contextmanager
def voice(*, quiet: bool, document: bool) -> Iterator[None]:
    """How much is said inside: quiet, nothing but answers; document, not even those, for stdout takes a document."""
    token = _VOICE.set((quiet, document))
    try:
        yield
    finally:
        _VOICE.reset(token)


class _Console(Console):
    """Every string that is printed, a table's cells too, is one line whose characters all show."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as rich prints it, which would let escape sequences through."""
        return super().render_str(visible(text), **options)

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich does it, but no table breaks a word, such as a path: lines that get too long the terminal wraps."""
        width = self.width
        needed = max((_fitted(own, width) for own in objects if isinstance(own, Table)), default=width)
        if needed > width:
            how |= {"crop": False}
            self.width = needed
        try:
            super().print(*objects, **how)
        finally:
            if needed > width:
                self.width = width

    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to the command line, instead of rich's exit code 1."""
        raise BrokenPipeError


def console(*, answer: bool = False, markup: bool = False) -> Console:
    """A console on stdout; as wide as it takes where that is no terminal. answer: it says what the command is for."""
    quiet, document = _VOICE.get()
    silent = document or (quiet and not answer)
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return _Console(width=width, highlight=False, markup=markup, quiet=silent)


def _fitted(made: Table, width: int) -> int:
    """Give the columns of a table widths that together take `width`, where that breaks no word; what they take."""
    cells = [[str(cell) for cell in (column.header, *column.cells)] for column in made.columns]
    longest = [max(map(cell_len, own), default=0) for own in cells]
    words = [max((cell_len(word) for cell in own for word in cell.split()), default=0) for own in cells]
    words = [most if column.no_wrap else word for column, most, word in zip(made.columns, longest, words, strict=True)]
    gaps = _GAP * (len(cells) - 1)
    if sum(longest) + gaps <= width:
        return width
    rest = max(0, width - sum(words) - gaps)
    for column, most, word in sorted(zip(made.columns, longest, words, strict=True), key=lambda own: own[1] - own[2]):
        growing = sum(1 for other in made.columns if other.width is None)
        column.width = word + min(most - word, rest // growing)
        rest -= column.width - word
    return max(width, sum(column.width or 0 for column in made.columns) + gaps)


def remark(text: str) -> None:
    """One line on stderr that is no error."""
    if not _VOICE.get()[0]:
        print(f"qcompile: note: {visible(text)}", file=sys.stderr)


def table(*columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are aligned to the right; names fold instead of being cut."""
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        right = index >= len(columns) - numbers
        made.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return made


class Bar:
    """How far a job is, on stderr: a bar with the time left on a terminal, a plain line now and then elsewhere.

    still: nothing is drawn between the calls, where a measurement would feel it.
    """

    def __init__(self, *, still: bool = False) -> None:
        self._started = self._printed = time.monotonic()
        quiet, _ = _VOICE.get()
        self._out = Console(stderr=True, highlight=False, markup=False, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._out, transient=True, auto_refresh=not still, disable=not self._out.is_terminal or quiet,
        )  # fmt: skip
        self._still, self._task = still, self._bar.add_task("starting", total=None)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, name: str) -> None:
        """A new step of the job."""
        self._show(description=visible(name))
        self._tell(name, often=" of " in name)

    def total(self, amount: float) -> None:
        """How much there is to do: tokens that the segments will see, windows, rounds."""
        self._show(total=max(amount, 1))

    def advance(self, amount: float) -> None:
        """So much of it is done now."""
        self._bar.advance(self._task, amount)

    def at(self, done: float, total: float, name: str = "") -> None:
        """So much of so much is done, in all."""
        self._show(completed=done, total=total, **({"description": visible(name)} if name else {}))
        self._tell(f"{name}: {int(done)} of {int(total)}" if total else name, often=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._out.print(visible(text), soft_wrap=True)

    def _tell(self, text: str, *, often: bool) -> None:
        """A plain line with the seconds so far, where there is no bar."""
        now = time.monotonic()
        if not self._out.is_terminal and (not often or now - self._printed > _OFTEN):
            self._printed = now
            left = self._bar.tasks[self._task].time_remaining
            ahead = f", {left:.0f} s left" if often and left else ""
            self.line(f"{now - self._started:5.0f} s  {text}{ahead}")

    def _show(self, **fields: Any) -> None:
        self._bar.update(self._task, **fields)
        if self._still:
            self._bar.refresh()
