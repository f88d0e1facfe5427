"""kill -9 at random moments of a compile, and two compiles to one output at once: is anything lost?

    python benchmarks/kills.py --kills 1000 --pairs 200
    python benchmarks/kills.py --resumed 20

Processes are forked from one that has imported everything and started no thread. After each kill, the output is one of
the two complete models (bytes and data), and after each pair too, with the reports of the same compile and nothing
beside them. Ends with exit code 1 and the first loss otherwise.

--resumed: each kill of a compile of a decoder by the default list is followed by the same compile, which goes on behind
the last checkpoint: the same bytes as undisturbed, nothing beside them, and both together at most 1.15 times the
processor time of an undisturbed run. So that a compile of half a minute has checkpoints, there is one every --every
seconds.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.walk import checkpoints
from qcompile.models.tiny import tiny_decoder, tiny_mlp, tiny_tokenizer
from qcompile.passes import lists

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["qcompile.compiler.pipeline", "onnxruntime"])
GROUPS = (16, 32)
# Files of a finished output: the model, its data, two reports.
FILES = 4
# What a kill and going on may cost on average, in times of the work of an undisturbed compile.
MOST = 1.15


class Lost(Exception):
    """What was found at the output is not a whole model of one compile."""


def hashes(output: Path) -> tuple[str, ...]:
    """Of a model and of the data it names, every byte of which is there."""
    model = load_model(output)
    values = (value.const_value for value in model.graph.initializers.values())
    (data,) = {Path(tensor.path) for tensor in values if isinstance(tensor, ir.ExternalTensor)}
    return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in (output, data))


class Harness:
    """A float model, an output, and what the two recipes make of it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.source, self.output = folder / "model.onnx", folder / "out" / "model.onnx"
        self.random = random.Random(seed)
        save_model(tiny_mlp(), self.source)
        self.known: dict[tuple[str, ...], int] = {}
        for group in (*GROUPS, GROUPS[0]):  # the first one waits for the imports
            started = time.monotonic()
            if self.finished(self.started(group)):
                raise Lost("an undisturbed compile failed")
            self.seconds = time.monotonic() - started
            self.known[self.pair()] = group
        if len(self.known) != len(GROUPS):
            raise Lost("the recipes make the same bytes")

    def started(self, group: int) -> BaseProcess:
        """A compile in a process of its own."""
        recipe = Recipe(passes=parse_passes("pack"), group_size=group)
        process = SERVER.Process(target=compile_model, args=(self.source, recipe), kwargs={"output": self.output})
        process.start()
        return process

    @staticmethod
    def finished(process: BaseProcess) -> int:
        """Its exit code."""
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def pair(self) -> tuple[str, ...]:
        """Hashes of what lies at the output."""
        return hashes(self.output)

    def group(self) -> int:
        """The group size of the recipe that made what lies at the output; Lost where no recipe did."""
        try:
            return self.known[self.pair()]
        except Exception as error:
            names = sorted(path.name for path in self.output.parent.iterdir())
            raise Lost(f"{type(error).__name__}: {error}; {names}") from error

    def kill(self, number: int) -> str:
        """Kill a compile of the other recipe: half of them anywhere, half near the end, where names change."""
        before = self.group()
        process = self.started(next(group for group in GROUPS if group != before))
        time.sleep(self.seconds * self.random.uniform(0.0 if number % 2 else 0.6, 1.1))
        process.kill()
        if self.finished(process) not in (0, -signal.SIGKILL):
            raise Lost(f"a compile failed with exit code {process.exitcode}")
        return "old" if self.group() == before else "new"

    def both(self) -> str:
        """Two compiles at once; the winner's model, data and reports are there, and nothing else."""
        processes = [self.started(group) for group in self.random.sample(GROUPS, 2)]
        codes = [self.finished(process) for process in processes]
        if any(codes):
            raise Lost(f"two compiles at once ended with {codes}")
        group, report = self.group(), json.loads(self.output.with_name("model.report.json").read_text())
        names = sorted(path.name for path in self.output.parent.iterdir())
        if report["recipe"]["group_size"] != group or len(names) != FILES or report["files"][1] not in names:
            raise Lost(f"the report is of another compile, or something is left: {names}")
        return f"group {group} last"


class Resuming:
    """A decoder, and what the default list makes of it undisturbed, with the seconds and processor seconds it takes."""

    def __init__(self, folder: Path, every: float, seed: int = 0) -> None:
        self.source, self.output = folder / "in" / "model.onnx", folder / "out" / "model.onnx"
        self.every, self.random = every, random.Random(seed)
        importlib.import_module("onnxruntime")  # once, not in each process
        save_model(tiny_decoder(layers=16, hidden=512, ffn=1536, vocab=512), self.source)
        tiny_tokenizer(512, self.source.parent)
        started = time.monotonic()
        _, self.cpu = self.ended(self.begun())
        self.seconds, self.wanted = time.monotonic() - started, hashes(self.output)

    def begun(self) -> int:
        """The process id of a compile."""
        if number := os.fork():
            return number
        code = 1
        try:
            checkpoints.EVERY = self.every
            recipe = Recipe(passes=parse_passes(lists.BEST), group_size=64, samples=32, context=256)
            report = compile_model(self.source, recipe, output=self.output)
            self.output.with_name("resumed").write_text(report.resumed)
            code = 0
        finally:
            os._exit(code)

    @staticmethod
    def ended(number: int) -> tuple[int, float]:
        """Its exit code, and its processor seconds."""
        _, status, used = os.wait4(number, 0)
        return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime

    def kill(self) -> tuple[str, float]:
        """Where the compile went on that was killed at a random moment, and the work of both, undisturbed as 1."""
        for file in self.output.parent.iterdir():
            file.unlink()
        code, moment, before = 0, 0.0, 0.0
        while code == 0:  # it had ended by then
            moment = self.seconds * self.random.uniform(0.0, 1.0)
            number = self.begun()
            time.sleep(moment)
            os.kill(number, signal.SIGKILL)
            code, before = self.ended(number)
        code, after = self.ended(self.begun())
        if code or hashes(self.output) != self.wanted:
            raise Lost(f"killed after {moment:.1f} s, and gone on with to other bytes (exit code {code})")
        resumed = self.output.with_name("resumed")
        told = resumed.read_text() or "the beginning"
        resumed.unlink()
        names = sorted(path.name for path in self.output.parent.iterdir())
        if len(names) != FILES:
            raise Lost(f"something is left beside the output: {names}")
        return told, (before + after) / self.cpu


def resumed(folder: Path, kills: int, every: float, seed: int) -> int:
    """Kill and go on so often, and print what it cost; the exit code."""
    harness = Resuming(folder, every, seed)
    print(f"undisturbed: {harness.cpu:.1f} CPU-s, {harness.seconds:.1f} s", flush=True)
    work = []
    for _ in range(kills):
        told, share = harness.kill()
        work.append(share)
        print(f"went on at {told}: {share:.3f} times the work", flush=True)
    mean = sum(work) / len(work)
    print(f"{kills} kills, the same bytes each time; work {mean:.3f} times on average, {max(work):.3f} at most")
    return int(mean > MOST)


def main() -> int:
    """Run what the options ask for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resumed", type=int, default=0, help="kills of a compile that is gone on with")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between checkpoints, with --resumed")
    args = parser.parse_args()
    if args.resumed:
        with tempfile.TemporaryDirectory(prefix="qcompile-kills-") as folder:
            return resumed(Path(folder), args.resumed, args.every, args.seed)
    with tempfile.TemporaryDirectory(prefix="qcompile-kills-") as folder:
        harness, started = Harness(Path(folder), args.seed), time.monotonic()
        kills = Counter(harness.kill(number) for number in range(args.kills))
        print(f"{args.kills} kills: {dict(kills)}, nothing lost, {time.monotonic() - started:.0f} s", flush=True)
        litter = len(list(harness.output.parent.iterdir()))
        pairs = Counter(harness.both() for _ in range(args.pairs))
        print(f"{args.pairs} pairs: {dict(pairs)}, nothing lost, {time.monotonic() - started:.0f} s")
        print(f"files beside the output after the kills: {litter}, after the pairs: {FILES if args.pairs else litter}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
