"""Instruction sets that this machine lacks, and machines that lack those of this one, under qemu's user emulation."""

import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
from kernel_builds import build_kernel_check, passed, run, tool
from native_models import native_library

pytestmark = pytest.mark.slow

PACKAGES = {"qemu-x86_64-static": "qemu-user-static", "qemu-aarch64-static": "qemu-user-static"}
PACKAGES |= {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
# Processors of qemu, and what of ours they run. qemu 7.2 emulates AVX2, but neither AVX512 nor AVX-VNNI.
X86 = {"Nehalem": ["reference"], "Haswell-noTSX": ["reference", "avx2"]}
# Cortex-A57 is the first 64-bit Arm, without the dot product; Neoverse N1 has it.
ARM = {"cortex-a57": ["reference"], "neoverse-n1": ["reference", "neon"]}


def _emulator(name: str) -> str:
    found = shutil.which(name)
    if found:
        return found
    hint = f"no {name}: apt-get install -y {PACKAGES[name]}"
    if shutil.which("apt-get") and os.geteuid() == 0:
        pytest.fail(hint)
    pytest.skip(hint)


@pytest.fixture(scope="module")
def x86() -> Path:
    """The build for this machine, and so for every other x86-64 as well."""
    if platform.machine() != "x86_64":
        pytest.skip("this machine is no x86-64")
    return build_kernel_check("kernel_check")


@pytest.fixture(scope="module")
def arm() -> Path:
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    compiler = _emulator("aarch64-linux-gnu-g++")
    return build_kernel_check("kernel_check_aarch64", *target, f"-DCMAKE_CXX_COMPILER={compiler}")


@pytest.mark.parametrize("processor", X86)
def test_x86(x86: Path, processor: str) -> None:
    """No instruction of a newer processor is met, and the paths that are left compute the same."""
    assert passed(run(_emulator("qemu-x86_64-static"), "-cpu", processor, x86 / "kernel_check")) == X86[processor]


@pytest.mark.parametrize("processor", X86)
def test_the_library_loads_on_older_machines(processor: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("this machine is no x86-64")
    script = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.qcompile_kernels.restype = ctypes.c_char_p; "
        "print(library.qcompile_kernels().decode())"
    )
    python = (sys.executable, "-S", "-c", script, native_library())
    output = run(_emulator("qemu-x86_64-static"), "-cpu", processor, *python)
    assert output.strip().split(",") == X86[processor]


@pytest.mark.parametrize("processor", ARM)
def test_arm(arm: Path, processor: str) -> None:
    emulator = (_emulator("qemu-aarch64-static"), "-cpu", processor, "-L", "/usr/aarch64-linux-gnu")
    assert passed(run(*emulator, arm / "kernel_check")) == ARM[processor]


def test_no_function_of_an_instruction_set_is_offered_to_other_files(x86: Path) -> None:
    """Of inline functions with external linkage the linker keeps one copy, maybe one that needs AVX512."""
    objects = list((x86 / "CMakeFiles").rglob("avx*.o"))
    assert len(objects) >= 4
    for path in objects:
        symbols = run(tool("nm"), "--format=posix", "--demangle", "--defined-only", path).splitlines()
        offered = [line for line in symbols if line.rsplit(" ", 3)[-3] in "WVuT"]
        assert offered == [], path
