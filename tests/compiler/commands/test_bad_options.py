"""Bad options, a missing runtime, a full disk, Ctrl-C: one line on stderr, the exit code, nothing written."""

import re
import signal
import subprocess
import sys
import time
import types
from typing import Any

import pytest
from said import complaints

from qcompile.compiler.files import save
from qcompile.models.tiny import tiny_decoder

OPTIONS = {
    "unknown_pass": (
        ["--passes", "smooth,pck"],
        r"unknown pass 'pck'; the passes are prepare, smooth, awq, rotate, gptq, pack",
    ),
    "unknown_parameter": (["--passes", "awq(gird=3),pack"], r"pass 'awq' has no parameter 'gird'; it has grid"),
    "unreadable_passes": (["--passes", "pack("], r"cannot read 'pack\(' in the pass list"),
    "parameter_type": (["--passes", "smooth(alpha=[),pack"], r"parameter alpha takes float or 'auto', got '\['"),
    "group_size": (["--group-size", "7"], r"group size 7 is not possible; give 8 to 4096, or 0"),
    "group_size_word": (["--group-size", "many"], r"--group-size: expected an integer, got 'many'"),
    "group_of_target": (["--group-size", "24", "--target", "matmulnbits"], r"matmulnbits takes group sizes 16, 32, 64"),
    "bits": (["--bits", "3"], r"4 or 8 bits, got 3"),
    "lm_head": (["--lm-head", "5"], r"expected 4, 8, a weight format or keep, got '5'"),
    "provider": (["--provider", "tpu"], r"no provider tpu; it has .*CPUExecutionProvider"),
    "missing_recipe": (["--recipe", "no.yaml"], r"recipe no\.yaml cannot be read"),
    "both_symmetries": (["--symmetric", "--asymmetric"], r"--asymmetric is there twice, or with its opposite"),
    "min_coverage": (["--min-coverage", "95"], r"min_coverage must lie between 0 and 1, got 95"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(occupied: Any, capsys: Any, name: str) -> None:
    occupied.refuses(capsys, occupied.save(tiny_decoder()), *OPTIONS[name])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"ONNX Runtime is not installed: pip install 'qcompile-onnx\[cpu\]'"),
        (types.SimpleNamespace(__version__="1.23.2"), r"ONNX Runtime 1\.23\.2 is too old: qcompile needs 1\.24\.4"),
        (types.SimpleNamespace(), r"ONNX Runtime is broken: reinstall it"),
    ],
    ids=["missing", "too old", "left over"],
)
def test_onnxruntime_that_cannot_be_used(
    occupied: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, module: Any, message: str
) -> None:
    path = occupied.save(tiny_decoder())
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    occupied.refuses(capsys, path, [], message)


def test_a_disk_that_fills_up(occupied: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = occupied.save(tiny_decoder())
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    occupied.refuses(capsys, path, [], r"needs 0 MB, 0 MB are free|No space left")


_LIMITED = """
import resource, sys
from qcompile.compiler import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("room", [2_000, 40_000], ids=["for nothing", "for the model file"])
def test_a_file_that_may_not_grow(occupied: Any, room: int) -> None:
    path = occupied.save(tiny_decoder())
    command = [sys.executable, "-c", _LIMITED, str(room), str(path), "--passes", "pack", "--group-size", "32"]
    before = occupied.snapshot()
    done = subprocess.run(
        [*command, "-o", str(occupied.folder / "out" / "model.onnx")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, complaints(done.stderr).count("\n")) == (2, 1), done.stderr
    assert re.search(r"cannot write .*File too large; free some space or write elsewhere", done.stderr)
    assert occupied.snapshot() == before


@pytest.mark.parametrize("word", ["loading", "preparing"])
def test_ctrl_c(occupied: Any, word: str) -> None:
    path = occupied.save(tiny_decoder(layers=8))
    before = occupied.snapshot()
    options = ["--samples", "8", "--context", "32", "--calibration", str(occupied.text)]
    command = [sys.executable, "-u", "-m", "qcompile.compiler.cli", str(path), *options]
    process = subprocess.Popen(
        [*command, "-o", str(occupied.folder / "out" / "model.onnx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell hands down "ignore"
    )
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, complaints(error)) == (130, "qcompile: interrupted, nothing was written\n")
    assert occupied.snapshot() == before
