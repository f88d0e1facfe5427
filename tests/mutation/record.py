"""Which tests run which lines of passes/: seen with coverage.py, module by module, and kept.

What was seen of a module is seen again once the module, or a file of passes/ that it ran, has changed.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mutation.forked import ROOT, in_fork

# What is asked whether it sees a fault of passes/: its own tests, and compiles of small graphs.
MODULES = ("tests/passes/**/test_*.py", "tests/compiler/test_ladder.py", "tests/test_graphs.py")
# CPU seconds a module may take, watched.
_MOST = 400


@dataclass(frozen=True)
class Record:
    """What a module of tests ran.

    digests: of the module, and of each file that it ran. seconds: of each test that passed, by node id. lines: by file
    and line, the tests that ran it, a bit for each of them in the order of `seconds`.
    """

    digests: dict[str, str]
    seconds: dict[str, float]
    lines: dict[str, dict[str, int]]

    @property
    def fresh(self) -> bool:
        """Whether all files are as they were."""
        return all((ROOT / path).exists() and digest(path) == was for path, was in self.digests.items())

    def inside(self, path: str) -> int:
        """How many lines of a file the tests run, beside those that an import runs."""
        return sum(bits != self.imported for bits in self.lines.get(path, {}).values())

    @property
    def imported(self) -> int:
        """The bits of what every test runs."""
        return (1 << len(self.seconds)) - 1

    def of(self, path: str, lines: tuple[int, int] | None) -> Iterator[tuple[str, float]]:
        """Tests that run one of these lines, and their seconds; None: what a module that runs the file imports."""
        bits, known = 0, self.lines.get(path, {})
        if lines is None:
            bits = self.imported if known else 0
        else:
            for line in range(lines[0], lines[1] + 1):
                bits |= known.get(str(line), 0)
        return (pair for number, pair in enumerate(self.seconds.items()) if bits >> number & 1)


def digest(path: str) -> str:
    """Of a file's content."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def recorded(folder: Path) -> list[Record]:
    """Records of all modules, kept in `folder`; those that are not there, or of other files, are made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted({path for pattern in MODULES for path in ROOT.glob(pattern)})
    return [_recorded(folder, path.relative_to(ROOT).as_posix()) for path in paths]


def _recorded(folder: Path, module: str) -> Record:
    kept = folder / f"{module.replace('/', '.')}.json"
    if kept.exists() and (found := Record(**json.loads(kept.read_text()))).fresh:
        return found
    started = time.monotonic()
    code, seconds, said = in_fork([module], _Watch(module, kept), limit=_MOST)
    if code not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):  # nothing collected: slow tests alone
        raise RuntimeError(f"{module}: pytest ended with {code}: {said[-2000:]}")
    print(f"recorded {module}: {seconds:.1f} s, {time.monotonic() - started:.0f} s on the clock", flush=True)
    return Record(**json.loads(kept.read_text()))


class _Watch:
    """A pytest plugin: each test is a context of its own; what fixtures and imports run is every test's."""

    def __init__(self, module: str, kept: Path) -> None:
        self.module, self.kept = module, kept
        self.seconds: dict[str, float] = {}
        self.passed = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        """Watch from before anything is imported, by conftest.py too."""
        from coverage import Coverage

        self.coverage: Any = Coverage(data_file=None, source=[str(ROOT / "passes")], config_file=False)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Keep the time where it passed."""
        self.passed, started = True, time.process_time()
        done = yield
        if self.passed:
            self.seconds[item.nodeid] = round(time.process_time() - started, 4)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Its own context."""
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Skipped and failed ones see nothing."""
        self.passed &= report.passed

    def pytest_sessionfinish(self) -> None:
        """Keep what was seen."""
        self.coverage.stop()
        bits = {test: 1 << number for number, test in enumerate(self.seconds)} | {"": (1 << len(self.seconds)) - 1}
        data, lines = self.coverage.get_data(), {}
        for file in sorted(data.measured_files()):
            found = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                seen = 0
                for context in contexts:
                    seen |= bits.get(context, 0)
                found[str(line)] = seen
            if found:
                lines[Path(file).relative_to(ROOT).as_posix()] = found
        digests = {path: digest(path) for path in (self.module, *lines)}
        self.kept.write_text(json.dumps({"digests": digests, "seconds": self.seconds, "lines": lines}))


if __name__ == "__main__":
    recorded(ROOT / "build" / "mutation")
