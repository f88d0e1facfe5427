"""What a job spent on each kind of its work."""

from collections.abc import Sequence
from dataclasses import dataclass, field

# How many are named on the terminal, and what share of the time is not worth a name there.
_NAMED, _SMALL = 4, 0.03


@dataclass
class Phase:
    """One kind of work, all its stretches together; work inside it that is a phase itself is not in it.

    of_pass: whether it is a pass, at all segments. seconds by the clock; cpu: seconds of all threads. read, written:
    bytes from and to disk, as the system counts them: what its cache held is not read. memory: the largest resident
    memory meanwhile in bytes, anonymous: that of it which no file stands for, both looked at 20 times a second (a new
    peak of the whole process is seen exactly). 0 where the system does not tell.
    spans: (start, end) in seconds since the job began, those close together as one.
    """

    name: str
    of_pass: bool = False
    seconds: float = 0.0
    cpu: float = 0.0
    read: int = 0
    written: int = 0
    memory: int = 0
    anonymous: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)


def longest(phases: Sequence[Phase]) -> str:
    """What took longest, in a line."""
    total = sum(phase.seconds for phase in phases)
    largest = sorted(phases, key=lambda phase: -phase.seconds)[:_NAMED]
    named = [phase for phase in largest if phase.seconds > _SMALL * total]
    parts = [f"{phase.name} {phase.seconds:.1f} s" for phase in named]
    rest = total - sum(phase.seconds for phase in named)
    return ", ".join([*parts, f"all else {rest:.1f} s"] if len(named) < len(phases) else parts)
