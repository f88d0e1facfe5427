"""What every size of a model was foretold to change, which of them was taken, and what that changed in truth."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qcompile.compiler.console.numbers import decibels, megabytes
from qcompile.passes.errors import UserError


@dataclass(frozen=True)
class Point:
    """One choice. size: bytes of the model's files, about; those of the chosen one once it is compiled. bits: a weight,
    of those chosen, scales included. change: foretold, KL in nats a token or a relative error. formats: of each unit.
    microseconds: foretold, of the products of a run; None where no times are known.
    """

    size: int
    bits: float
    change: float
    formats: tuple[str, ...]
    microseconds: float | None = None


@dataclass(frozen=True)
class Times:
    """What products take. machine: that they were measured on, in words. rows: of their inputs, 1 of decoders. floats:
    microseconds of all of them with what was chosen in float. units: microseconds of each unit, by format. file: the
    table that said so, where one was given.
    """

    machine: str
    rows: int
    floats: float | None
    units: tuple[Mapping[str, float], ...]
    file: str = ""

    def rate(self, microseconds: float) -> float:
        """Rows a second, of products alone."""
        return self.rows * 1e6 / microseconds if microseconds else math.inf


@dataclass(frozen=True)
class Tried:
    """A choice that was compiled. size: bytes of its files. change: foretold; distance: measured on what was held
    aside. microseconds: foretold, as of a `Point`.
    """

    size: int
    change: float
    distance: float
    microseconds: float | None = None


@dataclass(frozen=True)
class Frontier:
    """Choices of formats from the smallest on, each the one that changes least within its size, as far as is foretold.

    metric: KL or SQNR, whose changes are relative errors. windows: what changes were measured on. units: names of the
    weights that get a format together. chosen: the number of the point that was compiled, from 1. recipe: what was
    asked for, with no format chosen. source_hash: of the model. calibrated: names of the files and texts that its
    formats were chosen by, by the sha256 of their content.
    bound: what had to hold, in words; tried: the compiles that it took, the last that holds written; held_on: what
    they were compared on.
    speeds: where times of products are known. fastest: points go from the fastest on, each the one that changes least
    in its time.
    """

    metric: str
    windows: str
    units: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    chosen: int
    recipe: Mapping[str, Any]
    source_hash: str
    bound: str = ""
    tried: tuple[Tried, ...] = ()
    held_on: str = ""
    calibrated: Mapping[str, str] = field(default_factory=dict)
    fastest: bool = False
    speeds: Times | None = None

    def told(self, change: float) -> str:
        """A change as tables have it."""
        return f"{change:.3g}" if self.metric == "KL" else f"{decibels(change):.1f}"

    @property
    def unit(self) -> str:
        """What changes are told in."""
        return "KL, nats a token" if self.metric == "KL" else "SQNR, dB"

    @property
    def rate_unit(self) -> str:
        """What speeds are told in; empty where none are known."""
        return "" if self.speeds is None else "tokens/s" if self.speeds.rows == 1 else "rows/s"

    def rate(self, point: Point) -> str:
        """The speed of a point as tables have it; empty where it is not known."""
        if self.speeds is None or point.microseconds is None:
            return ""
        return _rate(self.speeds.rate(point.microseconds))

    @property
    def heads(self) -> list[str]:
        """Of `rows`, but for the last column."""
        return ["point", "size", "bits a weight", self.unit, *filter(None, [self.rate_unit])]

    def rows(self) -> list[list[str]]:
        """Of a table: number, size, bits a weight, change, speed where it is known, and which was taken."""
        return [
            [str(number), megabytes(own.size), f"{own.bits:.2f}", self.told(own.change),
             *([self.rate(own)] if self.rate_unit else []), "chosen" if number == self.chosen else ""]
            for number, own in enumerate(self.points, 1)
        ]  # fmt: skip

    def timed(self) -> str:
        """What speeds are of; empty where none are known."""
        if self.speeds is None:
            return ""
        own = self.speeds.floats
        floats = f"; {_rate(self.speeds.rate(own))} with all of them in float" if own is not None else ""
        alone = f"{self.rate_unit} of matrix products alone, and no attention or norms"
        return f"{alone}: from times of each on {self.speeds.machine}{floats}"

    def lines(self) -> list[str]:
        """What came of the bound, for the terminal."""
        told = [
            f"{self.told(own.distance)} with {megabytes(own.size)} (foretold {self.told(own.change)})"
            for own in self.tried
        ]
        return [f"{self.bound}: {self.unit}: {'; '.join(told)}; on {self.held_on}"] if told else []

    def at(self, number: int) -> "Frontier":
        """The same with another point chosen, nothing tried; UserError where there is none."""
        if not 1 <= number <= len(self.points):
            raise UserError(f"point {number} is not there: the frontier has points 1 to {len(self.points)}")
        return replace(self, chosen=number, bound="", tried=(), held_on="")

    def check_source(self, source: str, source_hash: str) -> None:
        """UserError where it is of another model."""
        if self.source_hash != source_hash:
            told = f"{self.source_hash[:12]}… is the hash of its model, {source_hash[:12]}… of this one"
            raise UserError(f"the frontier is of another model than {source}: {told}")

    def sized(self, size: int) -> "Frontier":
        """The same where the file of the chosen point has so many bytes: all of them are off by as much."""
        missed = size - self.points[self.chosen - 1].size
        return replace(self, points=tuple(replace(own, size=own.size + missed) for own in self.points))

    def with_tried(self, size: int, distance: float, bound: str, held_on: str) -> "Frontier":
        """The same with a compile of the chosen point more."""
        point = self.points[self.chosen - 1]
        own = Tried(size, point.change, distance, point.microseconds)
        return replace(self, bound=bound, tried=(*self.tried, own), held_on=held_on)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Frontier":
        """The frontier of plain values; ValueError where they are none."""
        import msgspec  # here: compiles without a frontier start sooner

        try:
            made = msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        timed = made.speeds is None or len(made.speeds.units) == len(made.units)
        if not made.points or not timed or any(len(own.formats) != len(made.units) for own in made.points):
            raise ValueError("each point has a format for each unit")
        return made


def _rate(own: float) -> str:
    return f"{own:,.0f}" if own >= 100 else f"{own:.3g}"
