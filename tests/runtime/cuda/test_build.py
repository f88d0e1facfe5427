"""The library with CUDA as nvcc builds it here: it loads without a driver, and its machine code is what was meant.

Where there is no nvcc and the installed library has no CUDA, these tests are skipped, and say so.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_harness import Library
from cuda_plans import cuobjdump, readable, resources
from kernel_builds import ROOT, build_kernel_check, run, tool

from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path

CUDA = ROOT / "runtime" / "kernels" / "cuda"
NEEDED = {"80", "90a"}
CHECKS = ("cuda_check", "rows_check", "cuda_check_sm90")

Opcodes = dict[tuple[str, str], Counter[str]]  # (kernel, architecture) -> how often each opcode occurs


def _nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        pytest.skip("no nvcc, and the installed library has no CUDA kernels")
    return found


def _architectures(library: Path) -> set[str]:
    return {name for name in Library(library).architectures() if not name.endswith("virtual")}


@pytest.fixture(scope="module")
def library() -> Path:
    """The installed library if it has the CUDA kernels of sm_80 and sm_90a, else one that is built for these two."""
    try:
        if _architectures(library_path()) >= NEEDED:
            return library_path()
    except (UserError, AttributeError):  # no library, or an older one
        pass
    _nvcc()
    options = ("-DQCOMPILE_CUDA=ON", "-DQCOMPILE_CUDA_ARCHITECTURES=80-real;90a-real")
    return build_kernel_check("cuda", *options, target="qcompile_kernels") / "libqcompile_kernels.so"


@pytest.fixture(scope="module")
def disassembler() -> str:
    found = cuobjdump()
    if not found:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


@pytest.fixture(scope="module")
def machine_code(library: Path, disassembler: str) -> Opcodes:
    """Opcodes without their suffixes, of every kernel for every architecture."""
    folders = [str(Path(disassembler).parent), os.environ.get("PATH", "")]  # cuobjdump calls nvdisasm
    environment = {**os.environ, "PATH": os.pathsep.join(folders)}
    command = [disassembler, "--dump-sass", str(library)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return dict(_opcodes(process.stdout))


def _opcodes(sass: str) -> Iterator[tuple[tuple[str, str], Counter[str]]]:
    """From the text of cuobjdump: `/*0010*/  @!P0 LDGSTS.E.BYPASS.128 … ;`, under `Function : NAME`."""
    for part in sass.split("\t\tFunction : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        architecture = re.search(r"EF_CUDA_SM(\d+)", part)
        assert architecture, part[:200]
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", part)
        yield (name, architecture[1]), Counter(found)


def _kernels(code: Opcodes, word: str, architecture: str) -> list[Counter[str]]:
    found = [opcodes for (name, built), opcodes in code.items() if word in name and built == architecture]
    assert found, f"no {word} kernel for sm_{architecture}"
    return found


# ---- the library


def test_it_loads_without_a_driver(library: Path) -> None:
    """In a process that cannot find a driver: the CPU kernels answer, the CUDA side finds no device and says why."""
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])\n"
        "library.qcompile_chosen_kernel.restype = library.qcompile_cuda_error.restype = ctypes.c_char_p\n"
        "print(library.qcompile_chosen_kernel().decode(), library.qcompile_cuda_devices(), sep='\\n')\n"
        "library.qcompile_cuda_weight_create.restype = ctypes.c_void_p\n"
        "data = ctypes.create_string_buffer(64 * 64)\n"
        "wide = ctypes.c_int64\n"
        "made = library.qcompile_cuda_weight_create(wide(64), wide(64), wide(64), 4, 0, 1, data, data, None)\n"
        "print(made, library.qcompile_cuda_error().decode(), sep='\\n')\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", code, str(library)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    kernel, devices, weight, error = process.stdout.splitlines()
    assert (bool(kernel), devices, weight) == (True, "0", "None")
    assert re.search("driver|device", error), error


def test_it_links_neither_driver_nor_runtime_nor_cublas(library: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", run(tool("readelf"), "-d", library))
    assert needed
    assert [name for name in needed if "cu" in name.lower()] == []


def test_only_the_declared_functions_are_offered(library: Path) -> None:
    """Static cudart and our own classes stay inside: a second library with them may live in the process."""
    symbols = run(tool("nm"), "-D", "--format=posix", "--defined-only", library)
    offered = {line.split()[0] for line in symbols.splitlines()}
    inside = {name for name in offered if re.match(r"_*cu|_Z.*8qcompile|fatbin", name)}
    assert inside == set()
    assert len([name for name in offered if name.startswith("qcompile_cuda_")]) == 12


# ---- machine code


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_decode_kernels_use_tensor_cores_and_asynchronous_copies(machine_code: Opcodes, architecture: str) -> None:
    """mma.sync is HMMA, cp.async LDGSTS, ldmatrix LDSM, and nibbles are taken out by LOP3."""
    for opcodes in _kernels(machine_code, "decode_kernel", architecture):
        assert {"HMMA", "LDGSTS", "LDSM", "LOP3"} <= set(opcodes)
        assert not {"I2F", "I2FP", "F2F"} & set(opcodes), "codes are converted one by one"


def test_hopper_kernels_use_wgmma_and_the_copy_engine(machine_code: Opcodes) -> None:
    """wgmma is HGMMA; a tensor map's copy UTMALDG, a bulk copy UBLKCP."""
    for opcodes in _kernels(machine_code, "hopper_kernel", "90"):
        assert {"HGMMA", "UTMALDG", "UBLKCP", "LOP3", "USETMAXREG"} <= set(opcodes)
        assert "HMMA" not in opcodes


def test_no_kernel_touches_local_memory(machine_code: Opcodes) -> None:
    assert len(machine_code) > 10
    assert {key: o for key, o in machine_code.items() if {"LDL", "STL"} & set(o)} == {}


def _budgets() -> list[tuple[str, str, int]]:
    lines = [line.split() for line in (CUDA / "budgets.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    return [(pattern, architecture, int(registers)) for pattern, architecture, registers in lines]


def test_every_kernel_is_within_its_budget(library: Path, disassembler: str) -> None:
    """What the library itself says, against the table that the build uses; with -s the table is printed."""
    found, budgets = resources(library), _budgets()
    names = readable([row[0] for row in found])
    assert len(found) > 10
    for name, architecture, registers, stack, shared in found:
        lines = (
            most for pattern, *where, most in budgets if re.search(pattern, name) and where[0] in ("*", architecture)
        )
        most = next(lines, 255)
        print(f"{names[name]:60} {architecture:7} {registers:3} of {most:3} registers, {shared} bytes static shared")
        assert (registers <= most, stack) == (True, 0), f"{names[name]} for {architecture}"


def test_every_budget_is_of_a_kernel(library: Path, disassembler: str) -> None:
    """A line that matches nothing is of a kernel that was renamed: its successor would have no budget."""
    names = {row[0] for row in resources(library)}
    assert [pattern for pattern, *_ in _budgets() if not any(re.search(pattern, name) for name in names)] == []


# ---- the launcher

STACK = """
__global__ void rambling(float* p, const int* at, int n) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = p[i];
  for (int i = 0; i < n; ++i) held[at[i]] += 1.0f;
  for (int i = 0; i < 64; ++i) p[i] = held[i];
}
"""
SMALL = "__global__ void doubling(float* p) { p[threadIdx.x] *= 2.0f; }"
REFUSED = {
    "stack": (STACK, "", r"budget: \w*rambling\w* for sm_80: 256 bytes stack frame, none allowed"),
    "registers": (SMALL, "doubling sm_80 3", r"budget: \w*doubling\w* for sm_80: \d+ registers, its budget is 3"),
    "no kernel": ("int host() { return 1; }", "", "budget: ptxas reported no kernel"),
    "C++": ("int host() { return missing; }", "", "missing"),
}


def _compile(folder: Path, source: str, budgets: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A compilation as the build does it, through the launcher."""
    (folder / "kernel.cu").write_text(source)
    (folder / "budgets.txt").write_text(budgets)
    target = folder / "kernel.o"
    command = ["sh", CUDA / "budget.sh", folder / "budgets.txt", _nvcc(), "-gencode=arch=compute_80,code=sm_80"]
    command += ["-c", folder / "kernel.cu", "-o", target]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False), target


@pytest.mark.parametrize("case", REFUSED)
def test_the_build_fails_on_a_kernel_over_its_budget(tmp_path: Path, case: str) -> None:
    source, budgets, message = REFUSED[case]
    process, target = _compile(tmp_path, source, budgets)
    assert process.returncode != 0
    assert re.search(message, process.stdout), process.stdout
    assert not target.exists(), "a second run of make would take it for done"


@pytest.mark.parametrize("budgets", ["", "doubling sm_90a 3", "# doubling sm_80 3", "doubling * 40\ndoubling * 3"])
def test_the_launcher_lets_pass_what_is_within(tmp_path: Path, budgets: str) -> None:
    """No line, one for another architecture, a comment, and of two lines the first."""
    process, target = _compile(tmp_path, SMALL, budgets)
    assert process.returncode == 0, process.stdout
    assert "Used" in process.stdout
    assert target.exists()


# ---- with and without


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_a_broken_nvcc(tmp_path: Path, wanted: str) -> None:
    """AUTO warns and builds without; ON is an error."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    command = [tool("cmake"), "-S", ROOT / "runtime" / "kernels", "-B", tmp_path / "build", f"-DQCOMPILE_CUDA={wanted}"]
    environment = {**os.environ, "CUDACXX": str(broken)}
    process = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment
    )
    told = re.sub(r"\s+", " ", process.stderr)
    assert "compiles nothing" in told, process.stderr
    assert (process.returncode == 0, f"QCOMPILE_CUDA={wanted}, but" in told) == (wanted == "AUTO", wanted == "ON")


# ---- proof of the arithmetic


@pytest.mark.parametrize("program", CHECKS)
def test_kernels_on_the_emulator(program: str) -> None:
    """The source of the kernels, run on the CPU thread by thread, against float64."""
    output = run(build_kernel_check("kernel_check", "-DQCOMPILE_CUDA=OFF", target=program) / program)
    lines = output.splitlines()
    assert lines
    assert [line for line in lines if not re.search(r"\b0 (failures|not as they must be)", line)] == []
