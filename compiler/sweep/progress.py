"""How a sweep tells what it is doing, and how far it is."""

from typing import Protocol

from qcompile.compiler.sweep.rows import Row, Sweep

# Share of a combination's time that compiling takes, for the progress bar: scoring is the rest.
COMPILING = 0.8


class Watcher(Protocol):
    """Told how a sweep goes on; the command line draws a bar, the default says nothing."""

    def begin(self, sweep: Sweep, row: Row, done: int, total: int) -> None:
        """A combination begins; `done` of the `total` to run are behind it."""

    def share(self, what: str, share: float) -> None:
        """How much of the combination, 0 to 1, is done, and what is going on."""

    def end(self, sweep: Sweep, row: Row, left: float) -> None:
        """A combination has ended; about so many seconds are left for the others."""


class Quiet:
    """Nothing is shown."""

    def begin(self, sweep: Sweep, row: Row, done: int, total: int) -> None:
        """Nothing."""

    def share(self, what: str, share: float) -> None:
        """Nothing."""

    def end(self, sweep: Sweep, row: Row, left: float) -> None:
        """Nothing."""


class Compiling:
    """The pipeline's progress as a share of a combination."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.name, self.rows, self.all = watcher, "", 0, 0

    def step(self, name: str) -> None:
        """A new step of the compile."""
        self.name = name
        self._tell()

    def total(self, rows: int) -> None:
        """Tokens that the segments will see."""
        self.all = rows

    def advance(self, rows: int) -> None:
        """Tokens done."""
        self.rows += rows
        self._tell()

    def _tell(self) -> None:
        self.watcher.share(self.name, COMPILING * min(1.0, self.rows / self.all) if self.all else 0.0)
