"""How long a compile by the default list would take, and on how much memory: a cost model with measured constants.

    python benchmarks/scale.py small --layers 1 2 4 --lists default --json small.json
    python benchmarks/plan.py small.json

Everything in the tables but the constants is an extrapolation: seconds of processor time that a measured shape took by
kinds of work, scaled by the arithmetic of other shapes, and divided by the processors that can share them.

    Case 1: statistics and advance: tokens x (weights + squares of the inputs' widths). Units of four windows are tasks.
    Case 2: rotate, smooth, awq, gptq: K² N of every product and K³ of every input. Chunks of 1,024 columns are tasks.
    Case 3: all else: the weights. This machine does it, on one core.
    Case 4: the network: what tasks are given, once to each machine, and give back goes through this machine's link, as
            fast as --link says. Ray may have machines hand it on to each other, which is not counted on.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scale import Line
from scale_models import SHAPES, Shape, at_depth

DEPTHS = {"llama-2-7b": 32, "llama-2-70b": 80, "llama-3.1-405b": 126}
MACHINES = (1, 8, 64)
STATISTICS, ROUNDING = ("statistics", "advance"), ("rotate", "smooth", "awq", "gptq")
_UNIT, _CHUNK = 4, 1024


@dataclass(frozen=True)
class Work:
    """Of one layer: operations of calibration and of rounding, and weights."""

    calibration: float
    rounding: float
    weights: int

    @classmethod
    def of(cls, shape: Shape, tokens: int) -> "Work":
        """By Cases 1 to 3; attention's own products are left out."""
        squares = sum(k * k for k, _ in shape.products)
        rounding = sum(k * k * n + k**3 / 3 for k, n in shape.products)
        return cls(2.0 * tokens * (2 * shape.layer_weights + squares), 2.0 * rounding, shape.layer_weights)


@dataclass(frozen=True)
class Rates:
    """Processor seconds for an operation of calibration, one of rounding, and for a weight of all else."""

    calibration: float
    rounding: float
    other: float

    @classmethod
    def measured(cls, shape: Shape, tokens: int, runs: Sequence[Mapping[str, object]]) -> "Rates":
        """From runs of one shape at several depths: what a layer more takes."""
        groups: dict[str, list[tuple[int, float]]] = {"calibration": [], "rounding": [], "other": []}
        for run in runs:
            phases: Mapping[str, float] = run["phases"]  # type: ignore[assignment]
            layers = int(run["layers"])  # type: ignore[call-overload]
            own = [sum(phases.get(name, 0.0) for name in names) for names in (STATISTICS, ROUNDING)]
            for group, seconds in zip(groups, [*own, sum(phases.values()) - sum(own)], strict=True):
                groups[group].append((layers, seconds))
        work = Work.of(shape, tokens)
        slopes = {group: Line.through(points).slope for group, points in groups.items()}
        return cls(
            slopes["calibration"] / work.calibration,
            slopes["rounding"] / work.rounding,
            slopes["other"] / work.weights,
        )


@dataclass(frozen=True)
class Plan:
    """Hours of a compile by what they go to, and bytes that a machine needs beside the model's files."""

    calibration: float
    rounding: float
    other: float
    network: float
    memory: float

    @property
    def hours(self) -> float:
        """All together: none of them waits for another."""
        return self.calibration + self.rounding + self.other + self.network

    @classmethod
    def of(
        cls, shape: Shape, rates: Rates, windows: int, context: int, machines: int, cores: int, link: float
    ) -> "Plan":
        """link: bytes a second between this machine and the others."""
        work, processors = Work.of(shape, windows * context), machines * cores
        units, chunks = -(-windows // _UNIT), sum(-(-n // _CHUNK) for _, n in shape.products)
        hours = shape.layers / 3600
        squares = 4 * sum(k * k for k, _ in shape.products)
        given = min(machines, units) * 2 * shape.layer_weights + machines * 2 * squares  # once to each machine
        sent = given + units * squares + 5 * shape.layer_weights  # float columns there, codes back
        widest = max(k for k, _ in shape.products)
        return cls(
            hours * rates.calibration * work.calibration / min(processors, units),
            hours * rates.rounding * work.rounding / min(processors, chunks),
            hours * rates.other * work.weights,
            hours * sent / link if machines > 1 else 0.0,
            2 * shape.layer_weights + 4 * sum(k * k for k, _ in shape.products) + min(cores, 2) * 8 * widest**2,
        )


def table(rates: Rates, windows: int, context: int, cores: int, link: float) -> str:
    """All models on all numbers of machines."""
    lines = [
        "| model (extrapolated) | machines | calibration h | rounding h | all else h | network h | hours | memory GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, layers in DEPTHS.items():
        for machines in MACHINES:
            plan = Plan.of(at_depth(SHAPES[name], layers), rates, windows, context, machines, cores, link)
            parts = (plan.calibration, plan.rounding, plan.other, plan.network, plan.hours)
            told = " | ".join(f"{hours:.2f}" for hours in parts)
            lines.append(f"| {name} | {machines} | {told} | {plan.memory / 1e9:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the constants and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="of scale.py --lists default --json, several depths of one shape")
    parser.add_argument("--cores", type=int, default=8, help="of each machine (default: 8)")
    parser.add_argument("--link", type=float, default=10, help="Gbit/s of this machine's link (default: 10)")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("N", "T"), default=(32, 512), help="default: 32 512")
    args = parser.parse_args()
    record = json.loads(args.figures.read_text())
    runs = [run for run in record["runs"] if run["passes"] == "default" and run["phases"]]
    windows, context = record["tokens"]
    rates = Rates.measured(Shape(**record["shape"]), windows * context, runs)
    print(
        f"measured: {1e-9 / rates.calibration:.1f} G operations a processor second in calibration, "
        f"{1e-9 / rates.rounding:.1f} in rounding; {1e9 * rates.other:.1f} ns a weight of all else\n"
    )
    print(table(rates, *args.tokens, args.cores, 1e9 * args.link / 8))


if __name__ == "__main__":
    main()
