"""Time and memory of a compile against depth and width: decoders of real shapes, made by scale_models.py.

    python benchmarks/scale.py llama-3.2-1b --layers 1 2 4 8 --lists pack awq default
    python benchmarks/scale.py llama-2-7b --layers 1 2 4 --lists default --python OLD/.venv/bin/python .venv/bin/python

Each compile is a child process. CPU seconds are user and system time of it and of what it started; memory is sampled
from /proc every 20 ms: anonymous pages (what must be free), and all that is resident (mapped weights, too, which the
system may drop). Fits are straight lines over the depths, by least squares; what they say beyond the greatest depth
that ran is marked extrapolated. Peaks of two compiles differ by more than what a layer adds, so that memory is also
fitted within each compile of four layers and more: the peak of each layer against its number, but for the first one.
Models and tokens are kept in --cache; they are large (llama-2-7b of 8 layers: 3.8 GB).
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scale_models import SHAPES, Shape, at_depth, decoder, tokens

LISTS = {"pack": "pack", "awq": "smooth,awq,pack", "default": ""}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qcompile" / "scale"
DEPTHS = (32, 80)  # that are extrapolated to
_PERIOD = 0.02  # seconds between looks at the memory
_PAGE = resource.getpagesize()


@dataclass
class Run:
    """What one compile took. cpu, elapsed in seconds; anonymous, resident (peaks) and packed in bytes; phases: the
    processor seconds of each kind of its work, as its report has them. by_layer: the anonymous peak of each.
    """

    python: str
    shape: str
    passes: str
    layers: int
    cpu: float = 0.0
    elapsed: float = 0.0
    anonymous: int = 0
    resident: int = 0
    packed: int = 0
    failed: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    by_layer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A straight line over depths: y = start + slope * layers."""

    start: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> "Line":
        """By least squares; of one point, a constant."""
        x, y = np.array(points, np.float64).T
        if len(set(x)) < 2:
            return cls(float(y.mean()), 0.0)
        slope, start = np.polyfit(x, y, 1)
        return cls(float(start), float(slope))

    def at(self, layers: int) -> float:
        """Its value at a depth."""
        return self.start + self.slope * layers


def memory(pid: int) -> tuple[int, int]:
    """Bytes (anonymous, resident) of a process and of those that it started, now; zeros of one that has ended."""
    anonymous = resident = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        own = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
        anonymous = 1024 * int(own.get("RssAnon", 0))
        resident = anonymous + 1024 * (int(own.get("RssFile", 0)) + int(own.get("RssShmem", 0)))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError, ValueError):
        return anonymous, resident
    for child in children:
        more = memory(int(child))
        anonymous, resident = anonymous + more[0], resident + more[1]
    return anonymous, resident


def measured(run: Run, words: Sequence[str], output: Path, limit: float) -> Run:
    """Run a command to its end, or to the limit in seconds, and look at it meanwhile."""
    seen = list[tuple[float, int]]()
    with tempfile.TemporaryFile() as said:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            anonymous, resident = memory(process.pid)
            run.anonymous, run.resident = max(run.anonymous, anonymous), max(run.resident, resident)
            seen.append((time.monotonic() - started, anonymous))
            if time.monotonic() - started > limit:
                process.kill()
                process.wait()
                run.failed = f"over {limit:.0f} s"
            time.sleep(_PERIOD)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    run.elapsed = time.monotonic() - started
    run.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode and not run.failed:
        run.failed = lines[-1] if lines else f"exit code {process.returncode}"
    for report in output.glob("*.report.json"):
        told = json.loads(report.read_text()).get("phases", [])  # an older qcompile tells none
        run.phases = {phase["name"]: phase["cpu"] for phase in told}
        run.by_layer = by_layer(seen, told, run.layers)
    run.packed = sum(file.stat().st_size for file in output.glob("*.data"))
    return run


def by_layer(seen: Sequence[tuple[float, int]], phases: Sequence[dict[str, Any]], layers: int) -> list[int]:
    """The anonymous peaks of so many layers: of what was seen (seconds, bytes), by when `pack` had each segment.

    A layer has as many segments as the next one, and the head is behind them. A report's time ends when it is written,
    which is just before the process ends.
    """
    spans = [span for phase in phases for span in phase["spans"]]
    packing = sorted(start for phase in phases if phase["name"] == "pack" for start, _ in phase["spans"])
    each = (len(packing) - 1) // layers if spans and packing else 0
    if not each:
        return []
    late = seen[-1][0] - max(stop for _, stop in spans)
    starts = [packing[layer * each] + late for layer in range(layers + 1)]
    return [
        max((own for at, own in seen if start <= at < stop), default=0) for start, stop in itertools.pairwise(starts)
    ]


def within(runs: Sequence[Run]) -> str:
    """Of each compile of four layers and more the line through the peaks of its layers, but for the first."""
    head = "| list | layers | peaks of the second layer to the last, MB | MB a layer | % of its packed bytes |"
    lines = [head, "|---|---:|---|---:|---:|"]
    for run in runs:
        peaks = [peak / 1e6 for peak in run.by_layer[1:]]
        if run.failed or len(peaks) < 3:
            continue
        line, each = Line.through(list(enumerate(peaks))), run.packed / run.layers / 1e6
        off = np.array(peaks) - [line.at(number) for number in range(len(peaks))]
        numbers = np.arange(len(peaks)) - np.arange(len(peaks)).mean()
        error = float(np.sqrt(off @ off / (len(peaks) - 2) / (numbers @ numbers)))
        told = ", ".join(f"{peak:.0f}" for peak in peaks)
        slope = f"{line.slope:+.2f} ± {error:.2f} | {100 * line.slope / each:+.1f} ± {100 * error / each:.1f}"
        lines.append(f"| {run.passes} | {run.layers} | {told} | {slope} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def compiled(run: Run, model: Path, data: Path, options: Sequence[str], limit: float) -> Run:
    """Compile a model of the cache into a folder beside it, which is removed."""
    output = Path(tempfile.mkdtemp(prefix=".out-", dir=model.parent.parent))
    words = [run.python, "-m", "qcompile", str(model), "-o", str(output / "model.onnx"), "--calibration", str(data)]
    words += ["--min-cosine", "0"]
    words += ["--passes", LISTS[run.passes]] if LISTS[run.passes] else []
    try:
        return measured(run, [*words, *options], output, limit)
    finally:
        shutil.rmtree(output)


def table(runs: Sequence[Run]) -> str:
    """All of them as a table."""
    head = "| qcompile | shape | list | layers | CPU s | elapsed s | anonymous MB | resident MB | packed MB | |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
    lines += [
        f"| {run.python} | {run.shape} | {run.passes} | {run.layers} | {run.cpu:.1f} | {run.elapsed:.1f} "
        f"| {run.anonymous / 1e6:.0f} | {run.resident / 1e6:.0f} | {run.packed / 1e6:.0f} | {run.failed} |"
        for run in runs
    ]
    return "\n".join(lines)


def fits(runs: Sequence[Run]) -> str:
    """Lines over the depths of each list, and what they say of deeper models."""
    head = ["qcompile", "shape", "list", "CPU s a layer", "memory a layer, % of its packed bytes"]
    head += [f"{name} at {depth} layers (extrapolated)" for depth in DEPTHS for name in ("CPU h", "anonymous GB")]
    lines = [f"| {' | '.join(head)} |", f"|---|---|---|{'---:|' * (len(head) - 3)}"]
    for key in dict.fromkeys((run.python, run.shape, run.passes) for run in runs):
        own = [run for run in runs if (run.python, run.shape, run.passes) == key and not run.failed]
        if len({run.layers for run in own}) < 2:
            continue
        cpu, anonymous, packed = (
            Line.through([(run.layers, getattr(run, name)) for run in own]) for name in ("cpu", "anonymous", "packed")
        )
        cells = [*key, f"{cpu.slope:.2f}", f"{100 * anonymous.slope / packed.slope:.1f}"]
        for depth in DEPTHS:
            cells += [f"{cpu.at(depth) / 3600:.2f}", f"{anonymous.at(depth) / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """Options, and those that are left for qcompile."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other options go to qcompile.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lists", choices=LISTS, nargs="+", default=["pack"])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="Pythons that have a qcompile each")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("N", "T"), default=(32, 512), help="default: 32 512")
    parser.add_argument("--limit", type=float, default=3600, help="seconds on the clock after which a compile is ended")
    parser.add_argument("--rounds", type=int, default=1, help="compiles of each; the Pythons take turns")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE}")
    parser.add_argument("--drop", action="store_true", help="remove each model behind its last compile")
    for name in ("hidden", "ffn", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    return parser.parse_known_args()


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that is asked for."""
    own = {name: getattr(args, name) for name in ("hidden", "ffn", "heads", "kv_heads", "vocab")}
    return replace(SHAPES[args.shape], **{name: value for name, value in own.items() if value is not None})


def main() -> None:
    """Make the models, compile them, print tables."""
    args, options = parsed()
    shape, runs = shape_of(args), list[Run]()
    args.cache.mkdir(parents=True, exist_ok=True)
    for layers in args.layers:
        own = at_depth(shape, layers)
        model, data = decoder(own, args.cache), tokens(own, *args.tokens, args.cache)
        for passes in args.lists:
            for python in args.rounds * args.python:
                run = compiled(Run(python, args.shape, passes, layers), model, data, options, args.limit)
                runs.append(run)
                print(table([run]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.drop:
            shutil.rmtree(model.parent)
    print(f"{args.shape}: {shape}; {args.tokens[0]} x {args.tokens[1]} random tokens; qcompile {' '.join(options)}\n")
    print("\n\n".join(filter(None, (table(runs), fits(runs), within(runs)))))
    if args.json is not None:
        record = {"shape": asdict(shape), "tokens": args.tokens, "options": options, "runs": [asdict(r) for r in runs]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
