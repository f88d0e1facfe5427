"""Who is told how a job goes on."""

from typing import Protocol


class Progress(Protocol):
    """Told what is going on; the command line draws a bar, the default says nothing."""

    def step(self, name: str) -> None:
        """A new step of the job begins."""

    def total(self, rows: int) -> None:
        """Tokens that the segments will see in all."""

    def advance(self, rows: int) -> None:
        """So many tokens went through a segment."""


class Silent:
    """No progress shown."""

    def step(self, name: str) -> None:
        """Nothing."""

    def total(self, rows: int) -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""
