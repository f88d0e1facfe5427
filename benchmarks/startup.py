"""How long the command line takes to answer: wall and CPU time of help, version and bad input, medians of --runs.

    python benchmarks/startup.py [--runs 9] [--against "OTHER COMMAND --help" …]

A process is started anew each time, with its files in the system's cache (the first start is not counted).
"""

import argparse
import resource
import shlex
import statistics
import subprocess
import sys
import time

OWN = (
    "--version",
    "--help",
    "help eval",
    "eval --help",
    "compile --help",
    "evla",
    "model.onnx --pases pack",
    "completion bash",
)


def main() -> None:
    """A Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--against", nargs="*", default=[], metavar="COMMAND", help="commands to time beside it")
    args = parser.parse_args()
    own = [(f"qcompile {words}", [sys.executable, "-m", "qcompile.compiler.cli", *words.split()]) for words in OWN]
    print("| command | wall, s | CPU, s |\n|---|---|---|")
    for name, command in [*own, *((other, shlex.split(other)) for other in args.against)]:
        wall, cpu = timed(command, args.runs)
        print(f"| `{name}` | {wall:.2f} | {cpu:.2f} |", flush=True)


def timed(command: list[str], runs: int) -> tuple[float, float]:
    """Median wall and CPU seconds of starting a command; the first run is left out."""
    walls, cpus = [], []
    for _ in range(runs + 1):
        before, started = _spent(), time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        walls.append(time.perf_counter() - started)
        cpus.append(_spent() - before)
    return statistics.median(walls[1:]), statistics.median(cpus[1:])


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
