"""Where the time of a job goes: `phase` around a kind of work, `recorded` around the job.

Invariant: at any moment the time, the reads and the writes of a job count for exactly one phase, the innermost one, or
for the rest of the job (`OTHER`): they add up to those of the job. Outside `recorded` a phase costs nothing.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

from qcompile.compiler.results.phases import Phase

P = ParamSpec("P")
T = TypeVar("T")
OTHER = "other"
_PERIOD = 0.05  # seconds between looks at the memory
_FINEST = 1 / 500  # of the job's time: spans closer than this become one
_CURRENT: ContextVar["Recorder | None"] = ContextVar("phases", default=None)


class Recorder:
    """The phases of one job so far."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._phases: dict[tuple[str, bool], Phase] = {}
        self._open = [self._phase(OTHER, of_pass=False)]
        self._process, self._statm = psutil.Process(), Path("/proc/self/statm")
        self._seen, self._start = self._counted(), self._began
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="qcompile-phases", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """No more looks at the memory."""
        self._ended.set()
        self._watcher.join()

    def enter(self, name: str, *, of_pass: bool) -> None:
        """What follows is of that phase, until `leave`."""
        self._switch()
        self._open.append(self._phase(name, of_pass=of_pass))

    def leave(self) -> None:
        """What follows is of the phase around."""
        self._switch()
        self._open.pop()

    def told(self) -> list[Phase]:
        """All of them as they are now, in the order in which they began; what follows does not change what is told."""
        self._switch()
        finest = _FINEST * (time.monotonic() - self._began)
        for phase in self._phases.values():
            phase.spans = _joined(phase.spans, finest)
            phase.seconds, phase.cpu = round(phase.seconds, 4), round(phase.cpu, 4)
        return [replace(phase, spans=[*phase.spans]) for phase in self._phases.values() if phase.spans]

    def _phase(self, name: str, *, of_pass: bool) -> Phase:
        return self._phases.setdefault((name, of_pass), Phase(name, of_pass))

    def _switch(self) -> None:
        """The innermost phase has had what happened since the last switch."""
        phase, now, seen = self._open[-1], time.monotonic(), self._counted()
        phase.seconds += now - self._start
        phase.spans.append((round(self._start - self._began, 3), round(now - self._began, 3)))
        phase.cpu += seen[0] - self._seen[0]
        phase.read, phase.written = phase.read + seen[1] - self._seen[1], phase.written + seen[2] - self._seen[2]
        self._look(phase)
        if seen[3] > self._seen[3]:  # the peak of the process was in this phase
            phase.memory = max(phase.memory, seen[3])
        self._start, self._seen = now, seen

    def _counted(self) -> tuple[float, int, int, int]:
        """Processor seconds, bytes read and written, and the largest memory of this process so far."""
        read = written = 0
        with suppress(psutil.Error, OSError, AttributeError, NotImplementedError):
            counters = self._process.io_counters()
            read, written = counters.read_bytes, counters.write_bytes
        return time.process_time(), read, written, peak_memory()

    def _look(self, phase: Phase) -> None:
        resident, anonymous = self._memory()
        phase.memory, phase.anonymous = max(phase.memory, resident), max(phase.anonymous, anonymous)

    def _memory(self) -> tuple[int, int]:
        with suppress(OSError):
            _, resident, shared = self._statm.read_text().split()[:3]
            page = os.sysconf("SC_PAGE_SIZE")
            return int(resident) * page, (int(resident) - int(shared)) * page
        with suppress(psutil.Error):
            return self._process.memory_info().rss, 0
        return 0, 0

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD):
            self._look(self._open[-1])


def _joined(spans: list[tuple[float, float]], finest: float) -> list[tuple[float, float]]:
    """Spans in order, a short gap between two of them closed."""
    found: list[tuple[float, float]] = []
    for start, end in spans:
        if found and start - found[-1][1] < finest:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


@contextmanager
def phase(name: str, *, of_pass: bool = False) -> Iterator[None]:
    """Count what is inside for a phase of the job that runs, if any."""
    recorder = _CURRENT.get()
    if recorder is None:
        yield
        return
    recorder.enter(name, of_pass=of_pass)
    try:
        yield
    finally:
        recorder.leave()


def recorded(job: Callable[P, T]) -> Callable[P, T]:
    """The same job, its phases recorded; those of a job inside another one are its own."""

    @wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        recorder = Recorder()
        token = _CURRENT.set(recorder)
        try:
            return job(*args, **kwargs)
        finally:
            _CURRENT.reset(token)
            recorder.close()

    return run


def phases() -> list[Phase]:
    """Those of the job that runs, so far."""
    recorder = _CURRENT.get()
    return [] if recorder is None else recorder.told()


def peak_memory() -> int:
    """Bytes of the largest resident memory of this process so far; 0 where the system does not tell.

    Linux tells ru_maxrss of what a process was before it became this program, too: of the one that started it.
    """
    with suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
