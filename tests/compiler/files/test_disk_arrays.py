"""files/disk_arrays.py: arrays come back bit for bit, files leave nothing behind, full disks are told in one line."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompile.compiler.files.disk_arrays import VARIABLE, Spill
from qcompile.passes.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    path = tmp_path / "spilled"
    path.mkdir()
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def _arrays() -> list[Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 7)).astype(np.float32)
    x[0, 0] = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 0, 1]
    return [
        x,
        x.astype(np.float16),
        x.astype(ml_dtypes.bfloat16),
        x > 0,
        rng.integers(-5, 5, (4, 1)),
        np.float64(1.5) * np.ones(()),
        np.zeros((2, 0, 3), np.float32),
        x.transpose(2, 0, 1),
        np.array(["a", None], object),
    ]


@pytest.mark.parametrize("budget", [0, 500, 1 << 20])
def test_arrays_come_back_in_any_order(folder: Path, budget: int) -> None:
    arrays, spill = _arrays(), Spill(budget)
    assert [spill.append(array) for array in arrays] == list(range(len(arrays)))
    assert len(spill) == len(arrays)
    for i in (*reversed(range(len(arrays))), 0, -1):
        given, back = arrays[i], spill[i]
        assert (back.dtype, back.shape) == (given.dtype, given.shape)
        assert back.tolist() == given.tolist() if given.dtype.hasobject else back.tobytes() == given.tobytes()
    assert [part.shape for part in spill[1:3]] == [(3, 5, 7)] * 2
    with pytest.raises(IndexError):
        spill[len(arrays)]


def test_memory_first_then_the_disk(folder: Path) -> None:
    arrays, spill = [np.full(100, i, np.float32) for i in range(4)], Spill(budget=1000)
    for array in arrays:
        spill.append(array)
    assert [spill[i] is array for i, array in enumerate(arrays)] == [True, True, False, False]


def _open_files() -> set[str]:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return {os.readlink(link) for link in links if link.is_symlink()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed in /proc")
def test_the_file_has_no_name_and_goes_with_the_spill(folder: Path) -> None:
    spill = Spill(budget=0)
    spill.append(np.ones(1000))
    assert list(folder.iterdir()) == [], "so that nothing stays behind, whatever ends the process"
    assert any(str(folder) in name for name in _open_files())
    del spill
    assert not any(str(folder) in name for name in _open_files())


_FULL = """
import resource
import numpy as np
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.passes.errors import UserError
spill = Spill(budget=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
spill.append(np.ones(500))
try:
    spill.append(np.ones(500))
except UserError as error:
    print(error)
"""


def test_a_full_disk(folder: Path) -> None:
    """The limit binds every file of a process, a redirected log too: it is set in one of its own."""
    done = subprocess.run([sys.executable, "-c", _FULL], capture_output=True, text=True, check=True)
    assert re.match(rf"cannot keep .* in {folder}: File too large; free .* or set {VARIABLE}", done.stdout), done


def test_a_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"absent: No such file or directory; .* set QCOMPILE_TMP to a folder"):
        Spill(budget=0).append(np.ones(5))


def test_without_the_variable_the_systems_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="in the temporary folder: No such file"):
        Spill(budget=0).append(np.ones(5))
