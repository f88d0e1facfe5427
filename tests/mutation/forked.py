"""pytest in a fork of this process, which has loaded what takes a second to load, and nothing of qcompile.

A fault is planted as the fork imports the file: nothing on disk changes, and processes that a test starts see the
sound file.
"""

import importlib.machinery
import linecache
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis  # noqa: F401  # loaded once for all forks, as the next ones are
import numpy as np  # noqa: F401
import onnx  # noqa: F401
import onnx_ir  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parents[2]
# A fork's memory: a fault may ask for any number of bytes.
_MOST_BYTES = 12 << 30
# Seconds on the clock for each second of CPU time: others may be at work on the machine, a fault may sleep for ever.
_PATIENCE = 8


def in_fork(
    tests: Sequence[str], plugin: Any, *, limit: float, fault: tuple[str, str] | None = None
) -> tuple[int | None, float, str]:
    """(exit code of pytest, CPU seconds, what it said); None where it died, or took more than `limit` CPU seconds.

    tests: paths or node ids. plugin: a pytest plugin, made before the fork. fault: a file of the repository, and what
    it is to be instead.
    """
    assert not any(name.split(".")[0] == "qcompile" for name in sys.modules), "a fork must import qcompile itself"
    folder = Path(tempfile.mkdtemp(prefix="qcompile-mutation-"))
    try:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(tests, plugin, folder, limit, fault)
        code, seconds = _wait(pid, started + limit * _PATIENCE)
        return code, seconds, (folder / "said").read_text("utf-8", "replace")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(pid: int, end: float) -> tuple[int | None, float]:
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else None), used.ru_utime + used.ru_stime
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            _, _, used = os.wait4(pid, 0)
            return None, used.ru_utime + used.ru_stime
        time.sleep(0.02)


def _run(tests: Sequence[str], plugin: Any, folder: Path, limit: float, fault: tuple[str, str] | None) -> None:
    """In the fork: never returns."""
    code = 3
    try:
        os.setsid()
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
        os.environ["OMP_NUM_THREADS"] = "1"
        os.chdir(ROOT)
        if fault is not None:
            plant(ROOT / fault[0], fault[1])
        quiet = ["-q", "--tb=line", "-p", "no:cacheprovider", "--basetemp", str(folder / "temp")]
        code = int(pytest.main([*quiet, *tests], plugins=[plugin]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def plant(path: Path, text: str) -> None:
    """From now on an import of the file finds this text, as does who reads its source (onnxscript does)."""
    load = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
        return compile(text, path, "exec") if Path(self.path) == path else load(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
