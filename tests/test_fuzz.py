"""tests/fuzz/: a minute of damaged files, the same ones every time; and the watcher sees what it is there for."""

import os
from pathlib import Path

import numpy as np
import pytest
from fuzz import run
from fuzz.mutate import mutated
from fuzz.seeds import seeds
from fuzz.worker import verdict

# Seconds for the mutants, and at most so many. QCOMPILE_FUZZ_SECONDS: other than a minute.
_SECONDS, _CASES = float(os.environ.get("QCOMPILE_FUZZ_SECONDS", "60")), 3000


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    found = run.fuzz(seed=0, seconds=_SECONDS, cases=_CASES, keep=tmp_path / "kept")
    assert found.failures == {}, f"{found}; kept in {tmp_path / 'kept'}"
    assert found.ran >= 20, found


def test_a_mutant_is_decided_by_its_number() -> None:
    for seed in seeds():
        made = [mutated(seed, np.random.default_rng([5, 77])) for _ in range(2)]
        assert made[0] == made[1]


def test_mutants_differ_from_their_seeds() -> None:
    seed = seeds()[0]
    different = sum(mutated(seed, np.random.default_rng([5, number])) != seed.files for number in range(50))
    assert different > 40


@pytest.mark.parametrize(
    ("code", "told", "good"),
    [
        (0, "", True),
        (0, "a warning\n", True),
        (0, "Traceback (most recent call last):\n", False),
        (2, "qcompile: error: x.onnx: no such file\n", True),
        (2, "qcompile: error: x\nand more\n", False),
        (2, "a warning\nqcompile: error: x\n", False),
        (2, "", False),
        (1, "qcompile: internal error: KeyError: 'x' (this is a bug; …)\n", False),
        (2, "qcompile: error: 'NoneType' object has no attribute 'shape'\n", False),
    ],
)
def test_what_is_good(code: int, told: str, good: bool) -> None:
    assert (verdict(code, told, []) == "ok") is good
    assert verdict(2, "qcompile: error: x\n", ["left.onnx"]) != "ok"


_WORKER = """
import argparse, ctypes, faulthandler, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pipe, folder = int(options["--pipe"]), options["--folder"]
os.dup2(os.open(os.path.join(folder, "stderr"), os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
faulthandler.enable(2)
number = int(options["--first"])
while True:
    os.write(pipe, b"%d start\\n" % number)
    faulthandler.dump_traceback_later(1, exit=True)
    if number == 2:
        ctypes.string_at(0)
    if number == 4:
        time.sleep(60)
    faulthandler.cancel_dump_traceback_later()
    os.write(pipe, b"%d %s\\n" % (number, b"exit code 1: oops" if number == 5 else b"ok"))
    number += 1
"""


def test_the_watcher_sees_dead_and_slow_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fuzz").mkdir()
    (tmp_path / "fuzz" / "__init__.py").write_text("")
    (tmp_path / "fuzz" / "worker.py").write_text(_WORKER)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "fuzz" / "run.py"))
    found = run.fuzz(seed=0, seconds=60, cases=8, keep=tmp_path / "kept")
    assert found.ran == 8
    assert sorted(found.failures) == [2, 4, 5]
    assert found.failures[2].startswith("process died with -11")
    assert found.failures[4].startswith("it takes more than 60 s")
    assert found.failures[5] == "exit code 1: oops"
    assert "1 not told in one line, 1 hangs, 1 dead processes" in str(found)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["2", "4", "5"]
