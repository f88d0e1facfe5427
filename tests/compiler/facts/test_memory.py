"""Memory does not grow with the number of calibration batches."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.facts import memory

# One batch is 4096 rows of 64 floats, 1 MiB; as much is carried between the two linears.
ROWS, WIDTH = 4096, 64
FEW, MANY = 8, 256
# The further batches take 248 MiB, and what is carried of them as much. Of each, 24 MiB more than with few batches may
# lie in memory (spill.BUDGET is 32 MiB); the rest is for what the allocator keeps.
MARGIN = 100 << 20

COMPILE = """
import sys
from pathlib import Path
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.stages import Calibration
from qcompile.compiler.recipe import Recipe, parse_passes

model, *files = sys.argv[1:]
recipe = Recipe(passes=parse_passes("smooth,pack"), group_size=32)
report = compile_model(model, recipe, output=model + ".out.onnx", calibration=Calibration(files))
(line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(report.data.split()[0], int(line.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x (batch, 64) through two linears: two segments."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), dtype="f4") / 8, name) for name in "ab"]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], weights)
    path = tmp_path_factory.mktemp("memory") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _peak(model: Path, calibration: list[str], count: int) -> int:
    """Largest resident memory of a compile, in bytes. The process reads it itself: what wait4 tells of a child holds
    the memory of the parent, too, which pytest may have made large."""
    words = [sys.executable, "-c", COMPILE, str(model), *calibration]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=model.parent)
    batches, peak = map(int, done.stdout.split())
    assert batches == count
    return peak


def _files(folder: Path, count: int) -> list[str]:
    path = folder / "x.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32))
    links = [folder / f"x-{count}-{number}.npz" for number in range(count)]
    for link in links:
        link.hardlink_to(path)
    return [str(link) for link in links]


def _function(folder: Path, count: int) -> list[str]:
    body = f"return ({{'x': np.full(({ROWS}, {WIDTH}), i, np.float32)}} for i in range({count}))"
    (folder / f"batches_{count}.py").write_text(f"import numpy as np\n\n\ndef make():\n    {body}\n")
    return [f"batches_{count}:make"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("source", [_files, _function])
def test_batches_are_not_kept_in_memory(model: Path, source: Callable[[Path, int], list[str]]) -> None:
    """Neither what the user gives nor the activations carried from the first segment to the second."""
    few, many = (_peak(model, source(model.parent, count), count) for count in (FEW, MANY))
    assert many - few < MARGIN


def test_swap_counts_where_no_container_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(free=7 << 30))
    assert memory.swappable() == 7 << 30
    for name, text in (("memory.max", "1000000"), ("memory.current", "400000"), ("memory.stat", "file 100000")):
        (tmp_path / name).write_text(text)
    assert (memory.available(), memory.swappable()) == (700_000, 0)
    (tmp_path / "memory.max").write_text("max")
    assert memory.swappable() == 7 << 30


@pytest.mark.skipif(memory._trim() is None, reason="the C library gives freed memory back by itself")
def test_what_was_freed_is_given_back() -> None:
    """Also what lies before something that is still used, which glibc keeps."""
    arrays = [np.ones(1 << 13) for _ in range(1600)]  # of 64 KB each: from the heap
    last, held = arrays.pop(), memory.resident()
    arrays.clear()
    memory.give_back()
    assert memory.resident() < held - 70e6
    assert last.all()
