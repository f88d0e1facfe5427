"""What a ladder of steps without data showed."""

import math
from dataclasses import dataclass

NOTHING, NORMS, SELF, MIXED = "no data", "norms as a proxy", "self-generated tokens", "mixed with random tokens"


@dataclass(frozen=True)
class Rung:
    """A step of the ladder and where it leads.

    name: where passes take statistics from. passes: those that can work with them. distance: of the finished graph
    from the float model, KL in nats a token or a relative error; told: the same in words.
    """

    name: str
    passes: tuple[str, ...]
    distance: float
    told: str


@dataclass(frozen=True)
class Ladder:
    """The rungs that were climbed, the last one written to the file. windows: what they were compared on."""

    rungs: tuple[Rung, ...]
    windows: str

    @property
    def best(self) -> Rung:
        """The rung of least distance."""
        return min(self.rungs, key=lambda rung: rung.distance)

    def steps(self) -> list[tuple[Rung, str]]:
        """Each rung, with its distance and how much less that is than behind the step before it, in words."""
        before = (math.nan, *(rung.distance for rung in self.rungs[:-1]))
        pairs = zip(before, self.rungs, strict=True)
        return [(rung, rung.told + _gain(known, rung.distance)) for known, rung in pairs]

    def lines(self) -> list[str]:
        """For the terminal."""
        told = [f"ladder    {rung.name}: {words} ({','.join(rung.passes)})" for rung, words in self.steps()]
        return [*told, *(f"          {line}" for line in (f"on {self.windows}", self.advice) if line)]

    @property
    def advice(self) -> str:
        """What to do where the last rung is not the best one."""
        if self.best is self.rungs[-1]:
            return ""
        how = {NORMS: "--calibration norms", SELF: "--calibration FILE, text of your own"}.get(self.best.name)
        how = how or f"--passes {','.join(self.best.passes)}"
        return f"{self.best.name} did better than {self.rungs[-1].name}: try {how}"


def _gain(before: float, distance: float) -> str:
    """How much less a distance is than another one; empty where that says nothing."""
    if not before > 0 or not math.isfinite(distance):
        return ""
    share = 1 - distance / before
    return f", {abs(share):.0%} {'less' if share >= 0 else 'more'} than the step before"
