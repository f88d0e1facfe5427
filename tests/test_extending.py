"""docs/extending.md: its package is installed and used by the commands that it gives."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from installing import install
from onnx import numpy_helper
from said import complaints

from qcompile.models.tiny import tiny_decoder

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
_FILE = re.compile(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
_COMMANDS = re.compile(r"```sh\n(.*?)```", re.DOTALL)
# One process for several commands: importing what they need takes most of their time.
_MAIN = """
import contextlib, io, json, sys
from qcompile.compiler.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


def run(site: Path, commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of commands of `qcompile`, with the packages of `site` beside it."""
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


def _documented() -> list[list[str]]:
    (block,) = (block for block in _COMMANDS.findall(TEXT) if "bell4" in block)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert all(command[0] == "qcompile" for command in commands)
    return [command[1:] for command in commands]


def _constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of the documentation is installed."""
    files = dict(_FILE.findall(TEXT))
    assert set(files) == {
        "pyproject.toml",
        *(f"qcompile_example/{name}.py" for name in ("prune", "deviation", "bell4")),
    }
    return install(tmp_path_factory.mktemp("site"), files)


@pytest.fixture(scope="module")
def used(site: Path, make_bench: Any) -> tuple[Path, list[tuple[int, str, str]]]:
    """The folder of what the documented commands, and a few beside, left; and what they said."""
    bench = make_bench("extending")
    model = bench.save(tiny_decoder(layers=1))
    quick = ["--samples", "8", "--context", "32", "--calibration", str(bench.text), "--group-size", "32"]
    commands = [
        [str(model) if word == "MODEL.onnx" else word for word in command] + (quick if "-o" in command else [])
        for command in _documented()
    ]
    data = ["--samples", "8", "--context", "32", "--calibration", str(bench.text)]
    commands += [
        ["calibrate", str(model), "--observer", "deviation", "-o", "own.statistics", *data],
        ["compile", str(model), "--passes", "smooth,qdq(observer=deviation)", "--statistics", "own.statistics"],
        [str(model), "--passes", "outlier(observer=deviation),qdq", "-o", "outlier.onnx", *data],
        [str(model), "--passes", "pack", "--weights", "bell4", "--target", "qdq", "-o", "qdq.onnx", *data],
        [str(model), "--passes", "pack", "--weights", "bell4", "--target", "matmulnbits", "-o", "no.onnx", *data],
        ["inspect", "qdq.onnx"],
    ]
    commands[6] += ["-o", "saved.onnx", *data]
    return bench.folder, run(site, commands, bench.folder)


def _report(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.report.json").read_text(encoding="utf-8"))


def test_its_rows_are_listed_with_their_package(used: Any) -> None:
    listed = used[1][0][1]
    for line in ("prune .*Zero the weight rows", "deviation .*root mean squares", "bell4 .*Quantiles of a normal"):
        assert re.search(rf"^{line}.*\(from qcompile-example 0\.1\)$", listed, re.MULTILINE), listed
    assert "threshold=0.0" in listed
    assert listed.count("(from ") == 3


def test_its_commands_run(used: Any) -> None:
    assert [code for code, *_ in used[1]].count(0) == len(used[1]) - 1, used[1]
    ((code, _, error),) = (one for one in used[1] if one[0])
    assert (code, complaints(error).count("\n")) == (2, 1)
    assert "target matmulnbits has no operator for bell4" in error


def test_its_pass_did_what_it_says(used: Any) -> None:
    decided = _report(used[0], "pruned")["decisions"]["prune"]
    assert len(decided) > 5
    for own in decided:
        assert re.fullmatch(
            {"pruned": r"\d+ of \d+ rows", "skipped": "its weight is shared .*"}[own["action"]], own["reason"]
        )


def test_its_observer_gave_the_ranges(used: Any) -> None:
    for name in ("static", "saved"):
        ranges = _report(used[0], name)["ranges"]
        assert {one["observer"] for one in ranges} == {"deviation"}
    assert _constants(used[0] / "static.onnx").keys() == _constants(used[0] / "saved.onnx").keys()


def test_its_format_is_in_the_files_and_told(used: Any) -> None:
    folder, said = used
    assert "bell4 g32" in said[4][1]
    assert "bell4" in said[-1][1], "by its table alone"
    operators = {node.op_type for node in onnx.load(folder / "bell4.onnx").graph.node}
    assert {"MatMulBell4", "EmbeddingInt8"} <= operators
    plain = onnx.load(folder / "qdq.onnx")
    assert {node.domain for node in plain.graph.node} == {""}
    assert not plain.functions
    errors = [one["error"] for one in _report(folder, "bell4")["nodes"]]
    assert 0 < max(errors) < 0.3


def test_its_version_is_in_report_and_metadata(used: Any) -> None:
    for name in ("pruned", "static", "bell4"):
        assert _report(used[0], name)["versions"]["qcompile-example"] == "0.1"
        metadata = {entry.key: entry.value for entry in onnx.load(used[0] / f"{name}.onnx").metadata_props}
        assert "qcompile-example 0.1" in metadata["qcompile.versions"]
