"""Libraries of the CUDA side for machines without CUDA: compiled by g++ alone, their device is the host."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "runtime" / "kernels"
# In place of CUDA's own header: what the host side of the operators needs of it.
_HEADER = "#pragma once\nusing cudaStream_t = struct CUstream_st*;\nenum cudaError_t : int { cudaSuccess };\n"


@functools.cache
def on_host() -> Path:
    """The CUDA operators as operators of the CPU provider, and the C entry points: see cuda/operators_check.cpp."""
    cuda = ("operators_check", "operators", "device_c_api", "host_c_api", "pack", "plan")
    return _compiled("on_host", [*(f"cuda/{name}.cpp" for name in cuda), "custom_op.cpp", "node.cpp"])


@functools.cache
def without_cuda() -> Path:
    """The C entry points of a library that was built without CUDA."""
    return _compiled("without_cuda", [f"cuda/{name}.cpp" for name in ("no_cuda", "host_c_api", "pack", "plan")])


def _compiled(name: str, sources: list[str]) -> Path:
    """A library of files of runtime/kernels that stops at undefined behaviour."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(tempfile.mkdtemp(prefix="qcompile-cuda-"))
    (folder / "cuda_runtime_api.h").write_text(_HEADER)
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-I", str(folder), '-DQCOMPILE_CUDA_ARCHITECTURES="host"']
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    files = [str(KERNELS / source) for source in sources]
    subprocess.run([compiler, *options, *checks, *files, "-o", str(folder / name)], check=True)
    return folder / name
