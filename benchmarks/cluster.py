"""The same work on one and on several local Ray nodes of one processor each: seconds by phase, and whether bytes agree.

    python benchmarks/cluster.py small --layers 2 --nodes 1 2 --kill

A decoder of scale_models.py is compiled by the default list and swept over four settings, first by this process alone,
then by each number of nodes; this process then loads and merges, on one thread. --kill: one more run in which a node
dies when a third of the rows went through.

What nodes of one machine can gain at most is measured as well: processes that know nothing of each other, each with
all of the work, run at once. Of N that take no longer than one alone the ceiling is N; of processors that share the
units of one core it is near 1, whatever the system calls them.
"""

import argparse
import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scale import CACHE
from scale_models import SHAPES, at_depth, decoder, tokens

from qcompile.compiler.console.progress import Silent
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.sweep.run import sweep
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.passes.threads import limited
from qcompile.runtime.cluster import clustered

PHASES = ("statistics", "advance", "smooth", "awq", "gptq")
GRID = {"bits": [4, 8], "passes": ["pack", "awq,pack"]}


class Killing(Silent):
    """Ends a node when a third of the rows of a compile went through."""

    def __init__(self, nodes: Any, node: Any) -> None:
        self.nodes, self.node, self.left = nodes, node, 0

    def total(self, rows: int) -> None:
        """So many in all."""
        self.left = rows // 3

    def advance(self, rows: int) -> None:
        """Rows more."""
        self.left -= rows
        if self.node is not None and self.left < 0:
            self.nodes.remove_node(self.node, allow_graceful=False)
            self.node = None


@contextmanager
def local(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of so many nodes of one processor, beside one that has none."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 500 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield nodes, [nodes.add_node(num_cpus=1, object_store_memory=500 << 20) for _ in range(count)]
    finally:
        nodes.shutdown()


def measured(model: Path, data: Path, folder: Path, progress: Silent | None = None) -> dict[str, Any]:
    """Seconds of the phases and of the sweep, and a digest of all bytes that were made."""
    recipe, digest = Recipe(min_cosine=0.0), hashlib.sha256()
    report = compile_model(model, recipe, output=folder / "model.onnx", calibration=[str(data)], progress=progress)
    found: dict[str, Any] = {p.name: p.seconds for p in report.phases if p.name in PHASES}
    found["compile"], started = report.seconds, time.monotonic()
    first, second, *others = sorted(data.glob("*.npz"))
    base = Recipe(min_cosine=0.0, passes=parse_passes("pack"))
    scored, given = Evaluation(data=[first, second]), [str(file) for file in others]
    sweep(model, GRID, output=folder / "sweep", recipe=base, calibration=given, evaluation=scored, keep_models=True)
    found["sweep"] = time.monotonic() - started
    for file in sorted(folder.rglob("model*")):
        if file.suffix in (".onnx", ".data"):
            digest.update(file.read_bytes())
    return found | {"sha256": digest.hexdigest()[:12]}


def alone(model: Path, data: Path, cache: Path) -> dict[str, Any]:
    """`measured` by this process, on one thread."""
    with tempfile.TemporaryDirectory(dir=cache) as folder, limited(1):
        return measured(model, data, Path(folder))


def ceiling(count: int, own: dict[str, Any], model: Path, data: Path, cache: Path) -> dict[str, float]:
    """How many times as much so many processes do at once as one does, whose seconds are given, phase by phase."""
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        rows = pool.starmap(alone, [(model, data, cache)] * count, chunksize=1)
    return {name: count * own[name] / max(row[name] for row in rows) for name in own if name != "sha256"}


def main() -> None:
    """Print a row for each number of nodes, and the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("N", "T"), default=(32, 128), help="default: 32 128")
    parser.add_argument("--kill", action="store_true", help="and one run in which a node dies")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE}")
    args = parser.parse_args()
    shape = at_depth(SHAPES[args.shape], args.layers)
    model, data = decoder(shape, args.cache), tokens(shape, *args.tokens, args.cache)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    print(f"{args.shape}: {asdict(shape)}, {args.tokens[0]} x {args.tokens[1]} tokens, seconds on the clock\n")
    columns = [*PHASES, "compile", "sweep", "sha256"]
    print(f"| nodes | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    first = alone(model, data, args.cache)
    _print("this process", [f"{first.get(name, 0.0):.1f}" for name in columns[:-1]], first["sha256"])
    for count in [*args.nodes, *([-max(args.nodes)] if args.kill else [])]:
        with (
            tempfile.TemporaryDirectory(dir=args.cache) as folder,
            limited(1),
            local(abs(count)) as (nodes, own),
            clustered(nodes.address),
        ):
            killing = Killing(nodes, own[-1]) if count < 0 else None
            row = measured(model, data, Path(folder), killing)
        told = f"{count}" if count > 0 else f"{-count}, one killed"
        _print(told, [f"{row.get(name, 0.0):.1f}" for name in columns[:-1]], row["sha256"])
    most = max(args.nodes)
    if most > 1:
        found = ceiling(most, first, model, data, args.cache)
        cells = [f"{found.get(name, 0.0):.2f} x" for name in columns[:-1]]
        _print(f"times as much by {most} processes at once", cells, "")


def _print(told: str, cells: list[str], sha256: str) -> None:
    print(f"| {told} | {' | '.join(cells)} | {sha256} |", flush=True)


if __name__ == "__main__":
    main()
