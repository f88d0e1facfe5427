"""The process that runs mutants, one after the other, through the command line; run.py starts it.

On the pipe that it is given it says "N start" before mutant N and "N VERDICT" behind it; nothing but "ok" is good.
A mutant that takes longer than the limit leaves a trace of all threads in the file `stderr` and ends the process.
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np

from fuzz.mutate import mutated
from fuzz.seeds import ARRAYS, MODEL, RECIPE, TOKENIZER, Seed, seeds
from qcompile.compiler import cli

_INSPECTED, _DRY, _MEMORY = 0.35, 0.7, 6 << 30


def arguments(seed: Seed, files: dict[str, bytes], folder: Path, random: np.random.Generator) -> list[str]:
    """The command line for a mutant: inspect, a dry run, or a compile."""
    model, kind = str(folder / MODEL), random.random()
    damaged = [name for name in (RECIPE, TOKENIZER, ARRAYS) if files.get(name) != seed.files.get(name)]
    if kind < _INSPECTED and not damaged:
        return ["inspect", model, *["--json"] * bool(random.random() < 0.3), *["--all"] * bool(random.random() < 0.3)]
    passes = seed.lists[int(random.integers(len(seed.lists)))]
    given = ["--passes", passes] if RECIPE not in damaged else []
    given += ["--recipe", str(folder / RECIPE), "--min-coverage", "0", "--samples", "2", "--context", "16"]
    if TOKENIZER in files and (random.random() < 0.5 or TOKENIZER in damaged):
        (folder / "text.txt").write_text("the quick brown fox. " * 20, encoding="utf-8")
        given += ["--calibration", str(folder / "text.txt")]
    elif random.random() < 0.9 or ARRAYS in damaged:
        given += ["--calibration", str(folder / ARRAYS)]
    dry = ["--dry-run"] if kind < _DRY and not {TOKENIZER, ARRAYS} & set(damaged) else []
    return [model, "-q", *given, *dry, "-o", str(folder / "out" / "model.onnx")]


def verdict(code: int, told: str, written: list[str]) -> str:
    """ "ok" for success, and for a refusal or a broken bound in one line that wrote nothing; else what is wrong."""
    lines = told.splitlines()
    if code == 0:
        return "ok" if "Traceback" not in told else "traceback with exit code 0"
    if code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("qcompile: error: "):
        return f"exit code {code}: {' | '.join(lines[-3:])[:600]}" if lines else f"exit code {code}, not a word"
    if "NoneType" in told or " object has no attribute " in told:
        return f"a refusal that nobody understands: {told.strip()}"
    return f"left files: {written}" if written else "ok"


def run(number: int, seed: int, folder: Path, log: int) -> str:
    """Make mutant `number`, run it, judge it. Its files stay in `folder`, with the command."""
    random = np.random.default_rng([seed, number])
    source = seeds()[int(random.integers(len(seeds())))]
    files = mutated(source, random)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = arguments(source, files, folder, random)
    (folder / "command").write_text("\n".join(command), encoding="utf-8")
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        code = cli.main(command)
    sys.stderr.flush()
    told = os.pread(log, 1 << 20, 0).decode("utf-8", "replace")
    return verdict(code, told, os.listdir(folder / "out"))


def main() -> None:
    """Run mutants from the first number on, until the pipe breaks or the numbers end."""
    parser = argparse.ArgumentParser()
    for name in ("--seed", "--first", "--step", "--limit", "--pipe"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    args.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(args.folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)  # native code writes there, too
    faulthandler.enable(2)
    for command in cli.COMMANDS.values():
        importlib.import_module(command[0])  # before the clock runs
    number = args.first
    while True:
        os.write(args.pipe, b"%d start\n" % number)
        faulthandler.dump_traceback_later(args.limit, exit=True)
        found = run(number, args.seed, args.folder / "case", log)
        faulthandler.cancel_dump_traceback_later()
        if found != "ok":
            (args.folder / "case").rename(args.folder / str(number))
        os.write(args.pipe, f"{number} {' '.join(found.split())}\n".encode("utf-8", "backslashreplace")[:4000])
        number += args.step


if __name__ == "__main__":
    main()
