"""Which nodes a mixed compile kept from integers, and what that changed."""

from dataclasses import dataclass

from qcompile.compiler.console.numbers import decibels, megabytes


@dataclass(frozen=True)
class Kept:
    """A node whose activations stay in float. rank: 1 is the worst. effect: of it alone in integers.

    weights_only: its weight becomes int8 all the same.
    """

    node: str
    rank: int
    effect: str
    weights_only: bool = False


@dataclass(frozen=True)
class Mixed:
    """Which of so many nodes were kept from integer activations, and what that changed on the check windows.

    before, after: distance from the float model with no node kept and with these (KL in nats a token, or a relative
    error). bytes_before, bytes_after: of all weights. held: the distance with these on what was held aside, held_on.
    """

    metric: str
    windows: str
    nodes: int
    kept: tuple[Kept, ...]
    before: float
    after: float
    bytes_before: int
    bytes_after: int
    held: float | None = None
    held_on: str = ""

    def told(self, distance: float) -> str:
        """A distance in the unit of the metric."""
        return f"{distance:.4g} nats a token" if self.metric == "KL" else f"{decibels(distance):.1f} dB"

    def lines(self) -> list[str]:
        """For the terminal."""
        names = ", ".join(f"{own.node} ({own.effect})" for own in self.kept[:8]) + (", …" if len(self.kept) > 8 else "")
        unit = " nats a token" if self.metric == "KL" else " dB"
        ends = [f"{d:.4g}" if self.metric == "KL" else f"{decibels(d):.1f}" for d in (self.before, self.after)]
        sizes = [megabytes(size) for size in (self.bytes_before, self.bytes_after)]
        light = sum(own.weights_only for own in self.kept)
        kept = f"{len(self.kept)} of {self.nodes} nodes kept in float" + (f" ({light}: weights int8)" if light else "")
        return [
            f"mixed     {kept}" + (f": {names}" if names else ""),
            f"          {self.metric} {ends[0]} → {ends[1]}{unit}, weights {sizes[0]} → {sizes[1]}; {self.windows}",
            *([f"          {self.metric} {self.told(self.held)} on {self.held_on}"] if self.held is not None else []),
        ]
