"""Weights of the CUDA side and their products on an emulated device (checks/weight_check.cpp); the checks can fail."""

import re
import subprocess
from pathlib import Path

import pytest
from kernel_builds import build_kernel_check, run

OPTIONS = ("kernel_check", "-DQCOMPILE_CUDA=OFF")


def _check(program: str) -> Path:
    return build_kernel_check(*OPTIONS, target=program) / program


def test_products_uploads_and_failures() -> None:
    lines = [line.split() for line in run(_check("weight_check")).splitlines()]
    assert [line[0] for line in lines] == ["products", "specials", "upload", "failures"]
    assert [int(line[1]) > least for line, least in zip(lines, (100, 800, 1, 4), strict=True)] == [True] * 4
    assert [line[3:5] for line in lines] == [["0", "failures,"]] * 4


@pytest.mark.parametrize(("program", "fault"), [("weight_check", "x"), ("rows_check", "code"), ("rows_check", "row")])
def test_the_checks_can_fail(program: str, fault: str) -> None:
    """One element of x, one code of a weight, one row of x is another than the check takes it for."""
    command = [str(_check(program)), "--sabotage", fault]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stdout + process.stderr
    assert re.search("FAILED (products|dequantize|prepare): ", process.stdout)
