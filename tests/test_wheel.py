"""The wheel: built, installed in a clean environment, used there, and its types read by checkers from outside."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

# What a user's first minutes are: nothing of the repository is at hand.
_PROGRAM = """
import json, sys
import numpy as np
import qcompile
from qcompile.models.tiny import tiny_mlp
import onnx_ir as ir

rows = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
ir.save(tiny_mlp(), "model.onnx")
report = qcompile.compile("model.onnx", passes="smooth,pack", bits=8, calibration=rows)
known = qcompile.session("model.onnx").run(None, {"x": rows})[0]
found = {k: qcompile.session(report.output, kernels=k).run(None, {"x": rows})[0] for k in ("native", "portable")}
errors = {k: float(np.linalg.norm(own - known) / np.linalg.norm(known)) for k, own in found.items()}
print(json.dumps({
    "version": qcompile.__version__, "file": qcompile.__file__, "library": str(qcompile.library_path()),
    "coverage": report.coverage, "errors": errors,
}))
"""
_TYPED = """
import numpy as np
import onnx
import qcompile


def small(model: onnx.ModelProto) -> qcompile.Report:
    data = {"x": np.zeros((2, 3), np.float32)}
    return qcompile.compile(model, passes="smooth,qdq", calibration=data, output="o.onnx", keep_worst=2, lm_head="keep")


def told(path: str) -> tuple[float, str, float]:
    report = qcompile.compile(path, ["smooth", "pack"], calibration=["a text"], bits=4, group_size=64, target="qdq")
    ranking = qcompile.sensitivity(path, calibration=(batch for batch in [np.zeros(3)]), transform=lambda batch: batch)
    scores = qcompile.compare({"small": path}, path, text=["one text", "another"]).records()
    return report.coverage, f"{qcompile.__version__}{scores}", ranking.nodes[0].effect
"""
_WRONG = {
    "qcompile.compile('m.onnx', bits=5)": ("arg-type", "reportArgumentType"),
    "qcompile.compile('m.onnx', grup_size=64)": ("call-arg", "reportCallIssue"),
    "number: int = qcompile.inspect('m.onnx')": ("assignment", "reportAssignmentType"),
    "qcompile.quantize('m.onnx')": ("attr-defined", "reportAttributeAccessIssue"),
}


def _run(words: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    return subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, its kernels for the CPU built."""
    folder = tmp_path_factory.mktemp("wheel")
    probe = _run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder / "probe", "packaging"], folder
    )
    if probe.returncode:
        pytest.skip(f"no package index: {probe.stderr.strip().splitlines()[-1]}")
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    done = _run([*words, "--config-settings=cmake.define.QCOMPILE_CUDA=OFF"], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = folder.glob("qcompile_onnx-*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with nothing but the wheel, its extra `cpu`, and what these need."""
    folder = tmp_path_factory.mktemp("clean")
    assert _run([sys.executable, "-m", "venv", folder / "venv"], folder).returncode == 0
    own = folder / "venv" / "bin" / "python"
    done = _run([own, "-m", "pip", "install", "-q", f"{wheel}[cpu]"], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return own


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"qcompile/__init__.py", "qcompile/py.typed", "qcompile/compiler/cli.py", "qcompile/passes/pack.py"} <= {
        *names
    }
    assert any(name.startswith("qcompile/runtime/libqcompile_kernels") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"qcompile"}
    assert not [name for name in names if "/api/qcompile/" in name or "/kernels/" in name or "test" in Path(name).name]
    licences = [name for name in names if name.endswith("LICENSE")]
    assert licences


def test_it_compiles_and_runs_in_a_clean_environment(python: Path, tmp_path: Path) -> None:
    done = _run([python, "-c", _PROGRAM], tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    site = str(python.parent.parent)
    assert told["file"].startswith(site)
    assert told["library"].startswith(site)
    assert told["coverage"] == 1.0
    assert 0 < max(told["errors"].values()) < 0.03
    command = python.with_name("qcompile")
    version = _run([command, "--version"], tmp_path)
    assert (version.returncode, version.stdout.split()[-1]) == (0, told["version"])
    done = _run([command, "model.onnx", "--passes", "pack", "--group-size", "32", "-o", "again.onnx"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.report.html").is_file()


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_are_seen_from_outside(python: Path, tmp_path: Path, checker: str) -> None:
    """What is right passes in strict mode; each wrong line is told."""
    pytest.importorskip(checker, reason=f"{checker} is part of the extra dev")
    (tmp_path / "right.py").write_text(_TYPED)
    (tmp_path / "wrong.py").write_text("import qcompile\n" + "\n".join(_WRONG) + "\n")
    if checker == "mypy":
        words = ["-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache"]
    else:
        settings = {"typeCheckingMode": "strict", "reportUnknownVariableType": False, "reportUnusedExpression": False}
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
        words = ["-m", "pyright", "--pythonpath", python]
    right = _run([sys.executable, *words, "right.py"], tmp_path)
    assert right.returncode == 0, right.stdout
    wrong = _run([sys.executable, *words, "wrong.py"], tmp_path)
    parts = re.split(r"wrong\.py:(\d+):", wrong.stdout)  # each told behind its line, in one line or several
    told: dict[int, str] = {}
    for line, text in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        told[line] = told.get(line, "") + text
    for line, kinds in enumerate(_WRONG.values(), 2):
        assert kinds[checker == "pyright"] in told.get(line, ""), wrong.stdout
