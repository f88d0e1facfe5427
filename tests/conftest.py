"""What the tests of the pipeline share: a folder with models in it, quick compiles, and folders as they were."""

import gc
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import settings
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.files.load import save_model
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.compiler.stages import Calibration
from qcompile.models.text import calibration_text
from qcompile.models.tiny import tiny_tokenizer
from qcompile.runtime import sessions

# Property tests draw the same examples in every run, so that what fails is the change; or others each time. How long
# one takes says how busy the machine is.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("others", deadline=None)
settings.load_profile("others" if os.environ.get("QCOMPILE_EXAMPLES") == "random" else "same")

# Idle threads of a session would spin where other tests want to run: half of the processor time of a small session.
assert sessions.session.__kwdefaults__ is not None
sessions.session.__kwdefaults__["spin"] = False

# Files whose tests take longest, or build programs. Each is one worker's; first, so that those at the end are short.
_FIRST = (
    *("test_fuzz.py", "test_end_to_end.py", "test_deploy.py", "test_extending.py", "runtime/cuda/", "runtime/test_"),
    *("passes/test_held.py", "compiler/walk/test_walk.py", "passes/prepare/test_tables.py", "passes/test_inner.py"),
    *("models/test_export", "compiler/sweep/test_run.py", "test_graphs.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first (`make test` has xdist keep this order)."""
    folder = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(folder).as_posix().startswith(_FIRST))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look at it, and may come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Enough for statistics of full rank in the tiny models (K up to 160) within a second.
QUICK = {"samples": 8, "context": 32, "group_size": 32}


@dataclass
class Bench:
    """A folder to work in: `in/` holds float models and a tokenizer, `out/` what is compiled."""

    folder: Path
    text: Path

    def save(self, model: ir.Model, name: str = "model.onnx", *, tokenizer: bool = True) -> Path:
        """The model with its external data in `in/`, a tokenizer of 256 bytes beside it."""
        path = self.folder / "in" / name
        save_model(model, path)
        if tokenizer:
            tiny_tokenizer(256, path.parent)
        return path

    def compile(self, model: Path, passes: str = "pack", *, output: str = "out/model.onnx", **settings: Any) -> Report:
        """Compile in this process, calibrated on a short text."""
        calibration, statistics = settings.pop("calibration", [str(self.text)]), settings.pop("statistics", None)
        asked = {name: settings.pop(name) for name in ("verify", "bench", "fresh", "checkpoints") if name in settings}
        recipe = Recipe(**{**QUICK, "passes": parse_passes(passes), **settings})
        given, target = Calibration(calibration), self.folder / output
        return compile_model(model, recipe, output=target, calibration=given, statistics=statistics, **asked)

    def run(self, model: Path, *options: str) -> int:
        """The exit code of the command line, compiling to out/model.onnx."""
        output = str(self.folder / "out" / "model.onnx")
        own = {"--samples": "8", "--context": "32", "--group-size": "32", "-o": output}
        quick = [word for name, value in own.items() if name not in options for word in (name, value)]
        return cli.main([str(model), *quick, *options])

    def refuses(
        self, capsys: pytest.CaptureFixture[str], model: Path, options: list[str], message: str, code: int = 2
    ) -> None:
        """Bad input: exit code 2, one line on stderr that says so, and not a byte in any folder has changed.

        code: 1 where the input is sound and a bound on the result does not hold.
        """
        before = self.snapshot()
        passes = [] if {"--passes", "--recipe"} & set(options) else ["--passes", "pack"]
        assert self.run(model, *passes, *options) == code
        error = complaints(capsys.readouterr().err, notes=False)
        assert error.count("\n") == 1, error
        assert error.startswith("qcompile: error: ")
        assert re.search(message, error), error
        assert self.snapshot() == before

    def snapshot(self) -> dict[str, str]:
        """Every file and folder, hidden ones too, with the hash of its content."""
        files = sorted(self.folder.rglob("*"))
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in files}


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pages of the bundled text: encoding all of it takes most of a tiny compile's time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(calibration_text()[:6000], encoding="utf-8")
    return path


@pytest.fixture
def bench(tmp_path: Path, short_text: Path) -> Bench:
    """A working folder of its own for each test."""
    return Bench(tmp_path / "bench", short_text)


@pytest.fixture(scope="session")
def make_bench(tmp_path_factory: pytest.TempPathFactory, short_text: Path) -> Callable[[str], Bench]:
    """A working folder that several tests read."""
    return lambda name: Bench(tmp_path_factory.mktemp(name), short_text)


@pytest.fixture
def occupied(bench: Bench) -> Bench:
    """A bench whose output folder holds what an earlier run left."""
    (bench.folder / "in").mkdir(parents=True)
    (bench.folder / "out").mkdir()
    for name in ("model.onnx", "model.report.json", "model-0123456789ab.data"):
        (bench.folder / "out" / name).write_bytes(b"model-0123456789ab.data of an earlier run")
    return bench
