"""The watcher: runs mutants in a process of their own, starts another where one dies, keeps what failed.

    make fuzz FUZZ_SECONDS=3600 FUZZ_SEED=7          until the time is over, seed 7
    make fuzz FUZZ_FIRST=1234 FUZZ_CASES=1 FUZZ_SEED=7   mutant 1234 again

A mutant is decided by its seed and number alone. Good is success, or one line of UserError with its exit code, nothing
written; a traceback, another exit code, a second line, more than 20 s and a dead process are failures. Each is kept in
the folder --keep: the files, the command, what was said.
"""

import argparse
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

_LIMIT = 20  # seconds a mutant may take
_AGAIN = 60  # and when it took longer on a machine that may be busy with others
_HANG = "it takes more than"
_START = 60  # and a process to begin with its first one


@dataclass
class Found:
    """What a run saw. failures: by number what was wrong."""

    ran: int = 0
    seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        dead = sum("process died" in why for why in self.failures.values())
        slow = sum(why.startswith(_HANG) for why in self.failures.values())
        return (
            f"{self.ran} mutants in {self.seconds:.0f} s: {len(self.failures) - dead - slow} not told in one line, "
            f"{slow} hangs, {dead} dead processes"
        )


def fuzz(*, seed: int, seconds: float, first: int = 0, cases: int | None = None, keep: Path | None = None) -> Found:
    """Run mutants from `first` on, until the time or their number is over."""
    found, started, number = Found(), time.monotonic(), first
    last = None if cases is None else first + cases
    with tempfile.TemporaryDirectory(prefix="qcompile-fuzz-") as name:
        while time.monotonic() - started < seconds and (last is None or number < last):
            for number, said in _results(seed, number, Path(name), started + seconds, last):  # noqa: B020
                found.ran += 1
                if said.startswith(_HANG):
                    said = next(iter(_results(seed, number, Path(name), inf, number + 1, _AGAIN)))[1]
                if said != "ok":
                    found.failures[number] = said
                    _keep(Path(name), keep, number, said)
            number += 1
    found.seconds = time.monotonic() - started
    return found


def _results(
    seed: int, first: int, folder: Path, end: float, last: int | None, limit: int = _LIMIT
) -> Iterator[tuple[int, str]]:
    """(number, verdict) of the mutants of one process, until it dies, or the time or the numbers are over."""
    reading, writing = os.pipe()
    options = {"seed": seed, "first": first, "step": 1, "limit": limit, "pipe": writing, "folder": folder}
    command = [sys.executable, "-m", "fuzz.worker"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, pass_fds=[writing], env=environment, stdout=subprocess.DEVNULL)
    os.close(writing)
    lines, current = _lines(reading, process), None
    try:
        for line in lines:
            number, _, said = line.partition(" ")
            if said == "start":
                current = int(number)
                if time.monotonic() > end or (last is not None and current >= last):
                    return
            else:
                current = None
                yield int(number), said
        if current is not None or process.poll() is not None:
            code = process.wait()
            trace = (folder / "stderr").read_text("utf-8", "replace") if (folder / "stderr").exists() else ""
            kind = f"{_HANG} {limit} s" if "Timeout (" in trace or code == -9 else f"process died with {code}"
            yield (first if current is None else current), f"{kind}: {trace[-3000:]}"
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def _lines(pipe: int, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines of the pipe; a process that says nothing for so long that it cannot even stop itself is killed."""
    rest = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], _AGAIN + _START)
        if not ready:
            process.kill()
            return
        got = os.read(pipe, 1 << 16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)


def _keep(folder: Path, keep: Path | None, number: int, said: str) -> None:
    if keep is None:
        return
    target = keep / str(number)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    case = folder / str(number)
    for file in [*(case if case.exists() else folder / "case").glob("*")]:
        shutil.move(file, target / file.name)
    (target / "verdict").write_text(said + "\n", encoding="utf-8", errors="backslashreplace")


def main() -> int:
    """The command line of `make fuzz`: 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    found = fuzz(seed=args.seed, seconds=args.seconds, first=args.first, cases=args.cases, keep=args.keep)
    for number, said in found.failures.items():
        print(f"{number}: {said[:300]}")
    print(found)
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
