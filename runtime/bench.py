"""Timing models against each other: each in a process of its own, taking turns, so that nothing of them mixes.

Threads, memory and caches of one model are no part of another's figures. A round gives every model one turn, and
figures of one round are compared with each other only: what slows the machine down for a while slows all of them.
"""

import multiprocessing
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt
import psutil

from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path
from qcompile.runtime.caches import Caches, Decoder
from qcompile.runtime.library import chosen_kernel
from qcompile.runtime.sessions import custom_operators, ort_version, registered_libraries, session

Feeds = Mapping[str, npt.NDArray[Any]]

# A turn repeats a run that is shorter than this, in seconds, until it has taken as long.
_TURN = 0.1


@dataclass(frozen=True)
class Subject:
    """A model file and how it is run; libraries: of custom operators, by default those that sessions register here.

    growing: whether it is a decoder with caches, see `session`.
    """

    label: str
    path: Path
    kernels: str = "auto"
    accuracy_level: int = 0
    threads: int = 1
    growing: bool = False
    libraries: tuple[Path, ...] = field(default_factory=registered_libraries)


@dataclass(frozen=True)
class Case:
    """Something to time: one run with `feeds`; or, where there are steps, those, and the run before them is not timed.

    caches: those that a step takes of the run before it. room: for how many tokens there is some in a shared buffer, as
    an application that knows how long it goes on makes it.
    amount: tokens, or rows, that the timed runs handle. unit: what its result is told in, "tokens/s" or "ms".
    """

    name: str
    feeds: Feeds
    amount: int
    unit: str = "tokens/s"
    steps: tuple[Feeds, ...] = ()
    caches: Caches = field(default_factory=Caches)
    room: int = 0


@dataclass(frozen=True)
class Loaded:
    """What loading a model took: seconds, and bytes of memory that were resident afterwards and not before."""

    seconds: float
    memory: int | None


@dataclass
class Measured:
    """All figures of a subject. seconds: of each case, one a round. memory: resident, with every case run."""

    subject: Subject
    cases: Sequence[Case]
    loads: list[Loaded] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: int | None = None


class Runner:
    """A loaded model that times cases: what a worker process does, without the process."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        ort_version()  # what importing it takes is not the model's
        before, started = resident_memory(), time.perf_counter()
        with custom_operators(subject.libraries):
            self.session: Any = session(
                subject.path,
                kernels=subject.kernels,
                accuracy_level=subject.accuracy_level,
                threads=subject.threads,
                growing=subject.growing,
            )
        seconds = time.perf_counter() - started
        self.before = before
        self.loaded = Loaded(seconds, self.memory())
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]

    def memory(self) -> int | None:
        """Bytes resident now and not before loading; None where the system does not tell."""
        now = resident_memory()
        return None if now is None or self.before is None else now - self.before

    def measure(self, case: Case) -> float:
        """Seconds of the case: all steps together, or the median of its run repeated; first runs warm up, untimed."""
        if case.steps:
            return self.decode(case)[0]
        times = [self._run(case.feeds)]
        if times[0] < _TURN:
            times.clear()
            while sum(times) < _TURN:
                times.append(self._run(case.feeds))
        return statistics.median(times)

    def decode(self, case: Case) -> tuple[float, dict[str, Any]]:
        """(seconds of all steps, OrtValues that the last gives beside caches); binding the values is not timed."""
        presents = set(case.caches.presents.values())
        names = [name for name in self.outputs if name not in presents]
        decoder = Decoder(self.session, case.caches, names, room=case.room)
        total = 0.0
        with self._named():
            found = decoder.step(case.feeds)
            for feeds in case.steps:
                found = decoder.step(feeds)
                total += decoder.seconds
        return total, dict(zip(names, found, strict=True))

    def _run(self, feeds: Feeds) -> float:
        """Seconds inside ONNX Runtime of one run, caches computed and all."""
        decoder = Decoder(self.session, Caches(), self.outputs)
        with self._named():
            decoder.step(feeds)
        return decoder.seconds

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.subject.label}: {error}") from error


class _Worker:
    """A Runner in a process of its own."""

    def __init__(self, subject: Subject, cases: Sequence[Case]) -> None:
        context = multiprocessing.get_context("spawn")
        self.subject = subject
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, subject, list(cases)), daemon=True)
        with _without_main():
            self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The worker's next answer; its UserError raised here."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):  # closed, or reset
            self.process.join()
            code = self.process.exitcode
            why = "out of memory?" if code == -9 else f"exit code {code}"  # SIGKILL, as the kernel sends it
            raise UserError(f"{self.subject.label}: its process ended while it was measured ({why})") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def ask(self, request: int | None) -> Any:
        """Seconds of a case, by its number; for None the resident memory."""
        with suppress(OSError):  # an ended process is told of by receive
            self.connection.send(request)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


@contextmanager
def _without_main() -> Iterator[None]:
    """Have a spawned process not import the caller's script again: it needs nothing of it, and one without the usual
    `if __name__ == "__main__"` would start over.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(connection: Connection, subject: Subject, cases: Sequence[Case]) -> None:
    """The worker: tells what loading took, then answers one request after the other until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted too, ends this process
    try:
        runner = Runner(subject)
        connection.send(runner.loaded)
        while True:
            request = connection.recv()
            answer = runner.memory() if request is None else runner.measure(cases[request])
            _settle()
            connection.send(answer)
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):
        pass


def _settle(limit: float = 1.0) -> None:
    """Wait until the session's threads sleep: they spin on for a while, at the cost of whoever has the next turn."""
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.002:
            return


@contextmanager
def _worker(subject: Subject, cases: Sequence[Case]) -> Iterator[_Worker]:
    made = _Worker(subject, cases)
    try:
        yield made
    finally:
        made.close()


def measure(
    subjects: Sequence[tuple[Subject, Sequence[Case]]],
    *,
    rounds: int,
    loads: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Every subject loaded `loads` times, then each of its cases timed in `rounds` rounds, behind one to warm up.

    Subjects take turns, in an order that turns round from one round to the next. All are in memory at the same time.
    progress(turns done, turns in all) is called after every turn.
    """
    results = [Measured(subject, cases) for subject, cases in subjects]
    total = len(results) * loads + (rounds + 1) * sum(len(result.cases) for result in results)
    turns = iter(range(1, total + 1))
    for _ in range(loads - 1):
        for result in results:
            with _worker(result.subject, ()) as worker:
                result.loads.append(worker.receive())
            progress(next(turns), total)
    with ExitStack() as stack:
        workers = []
        for result in results:
            worker = stack.enter_context(_worker(result.subject, result.cases))
            result.loads.append(worker.receive())
            workers.append((worker, result))
            progress(next(turns), total)
        for number in range(rounds + 1):
            order = workers if number % 2 else workers[::-1]
            for worker, result, index in _turns(order):
                seconds = worker.ask(index)
                if number:
                    result.seconds.setdefault(result.cases[index].name, []).append(seconds)
                progress(next(turns), total)
        for worker, result in workers:
            result.memory = worker.ask(None)
    return results


def _turns(workers: Sequence[tuple[_Worker, Measured]]) -> Iterator[tuple[_Worker, Measured, int]]:
    """(worker, its result, number of a case): the first case of everyone, then the second, …"""
    for index in range(max(len(result.cases) for _, result in workers)):
        for worker, result in workers:
            if index < len(result.cases):
                yield worker, result, index


def paired_ratio(reference: Sequence[float], own: Sequence[float]) -> float:
    """The median, over rounds, of the reference's seconds divided by one's own: above 1 is faster than it."""
    return statistics.median(theirs / mine for theirs, mine in zip(reference, own, strict=True))


def spread(values: Sequence[float]) -> float:
    """How far apart figures of the same thing lie: (largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def resident_memory() -> int | None:
    """Bytes of this process in memory, pages of mapped files included; None where the system is silent."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        return None


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor() or platform.machine()


def native_kernel() -> str | None:
    """The instruction set that the library of native kernels chooses here; None without a library, "" for none."""
    try:
        return chosen_kernel(library_path())
    except UserError:
        return None
