"""Builds of runtime/kernels/kernel_check for tests; CMake rebuilds what has changed since the last run."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A name and options: AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED = ("kernel_check_sanitized", "-DQCOMPILE_SANITIZE=ON")


def tool(name: str) -> str:
    """A program beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        pytest.skip(f"no {name}")
    return found


def build_kernel_check(name: str, *options: str, target: str = "kernel_check") -> Path:
    """Folder of the build, which stays in build/ for the next run; one process at a time builds there."""
    folder = ROOT / "build" / name
    cmake = tool("cmake")
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(cmake, "-S", ROOT / "runtime" / "kernels", "-B", folder, "-DQCOMPILE_CHECK=ON", *options)
        run(cmake, "--build", folder, "--target", target, "--parallel", "2")
    return folder


def run(*command: object, code: int = 0) -> str:
    """Output of a command that must end with exit code `code`."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert process.returncode == code, f"{command}: exit code {process.returncode}\n{process.stdout}{process.stderr}"
    return process.stdout


def passed(output: str) -> list[str]:
    """Names of the kernel sets that kernel_check reports on, all without a failure and with work done."""
    lines = output.splitlines()
    assert lines
    for line in lines:
        assert " 0 failures" in line, output
        assert int(line.split()[1]) > 400, line
    return [line.split()[0] for line in lines]
