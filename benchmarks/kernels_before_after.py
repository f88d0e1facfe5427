"""Single quantized layers by two builds of the library of native kernels: whether a change made products slower.

    git worktree add /tmp/before COMMIT
    cmake -S /tmp/before/runtime/kernels -B /tmp/before/build -DQCOMPILE_CUDA=OFF && cmake --build /tmp/before/build
    python benchmarks/kernels_before_after.py /tmp/before/build/libqcompile_kernels.so [--paths avx2] [--m 1,256]

Layers, variants and how a layer is timed: kernels.py. Each build has a few processes, because where the system puts a
process's memory alone changes the time of few rows by up to a quarter; a round gives each process a turn, in an order
that turns round. A row is the time before in shares of the time after (above 1: faster now), of the medians over rounds
of each build's fastest process, and of the fastest turns.
"""

import argparse
import os
import statistics
from collections.abc import Iterator

from kernels import Layer, Worker

from qcompile.passes.library import VARIABLE, library_path


def compared(paths: list[str], path: str, layer: Layer, variant: str, m: int, args: argparse.Namespace) -> str:
    """A row of the table."""
    seconds: list[list[float]] = [[], []]
    for number, turns in enumerate(rounds(paths, path, layer, variant, m, args)):
        for build in (0, 1):
            seconds[build].append(min(turns[build :: len(paths)]))
        if number + 1 == args.rounds:
            break
    before, after = seconds
    medians, fastest = (of(before) / of(after) for of in (statistics.median, min))
    return f"| {path} | {variant} | {layer} | {m} | {medians:.3f} | {fastest:.3f} | {min(after) * 1e6:.0f} |"


def rounds(
    paths: list[str], path: str, layer: Layer, variant: str, m: int, args: argparse.Namespace
) -> Iterator[list[float]]:
    """Seconds of a layer by each process, builds in turn, a round after the other."""
    workers = []
    for library in paths * args.processes:
        os.environ[VARIABLE] = library
        workers.append(Worker(path, args.cold << 20, args.turn, 2))
        workers[-1].ask("layer", layer)
        workers[-1].ask("check", variant, 1, m)
    try:
        order = list(range(len(workers)))
        while True:
            taken = {at: workers[at].ask("time", variant, 1, m) for at in order}
            yield [taken[at] for at in range(len(workers))]
            order = order[1:] + order[:1]
    finally:
        for worker in workers:
            worker.process.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("before", help="the library of the other commit")
    parser.add_argument("--after", default=str(library_path()), help="default: the installed one")
    parser.add_argument("--paths", default="avx2,avx512vnni")
    parser.add_argument("--variants", default="int8,a16,w8")
    parser.add_argument("--shapes", default="576x1536,4096x4096")
    parser.add_argument("--groups", default="32,128")
    parser.add_argument("--m", default="1,4,64,256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3, help="of each build")
    parser.add_argument("--turn", type=float, default=0.03, metavar="SECONDS")
    parser.add_argument("--cold", type=int, default=64, metavar="MB")
    args = parser.parse_args()
    print("| path | variant | layer | M | before / after | of fastest turns | µs now |\n|---|---|---|---|---|---|---|")
    for path in args.paths.split(","):
        for shape in args.shapes.split(","):
            for group in map(int, args.groups.split(",")):
                k, n = map(int, shape.split("x"))
                for variant in args.variants.split(","):
                    for m in map(int, args.m.split(",")):
                        layer = Layer(k, n, group, False)
                        print(compared([args.before, args.after], path, layer, variant, m, args), flush=True)


if __name__ == "__main__":
    main()
