"""The CUDA side for machines without CUDA: on an emulated device, and as a library that was built without it."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kernel_builds import build_kernel_check

KERNELS = Path(__file__).resolve().parent.parent / "runtime" / "kernels"


@functools.cache
def on_host() -> Path:
    """The CUDA operators as operators of the CPU provider, and the C entry points: see checks/operators_check.cpp."""
    folder = build_kernel_check("kernel_check", "-DQCOMPILE_CUDA=OFF", target="operators_check")
    return folder / "liboperators_check.so"


def without_cuda(folder: Path) -> Path:
    """The C entry points of a library that was built without CUDA, compiled into the folder."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "libwithout_cuda.so"
    files = [str(KERNELS / "cuda" / f"{name}.cpp") for name in ("no_cuda", "host_c_api", "pack", "plan")]
    subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *files, "-o", str(library)], check=True)
    return library


def c_functions(library: Path) -> Any:
    """The C entry points of cuda/c_api.h that are no plain ints."""
    functions = ctypes.CDLL(str(library))
    functions.qcompile_cuda_error.restype = functions.qcompile_cuda_architectures.restype = ctypes.c_char_p
    functions.qcompile_cuda_weight_create.restype = ctypes.c_void_p
    functions.qcompile_cuda_weight_scratch.restype = functions.qcompile_cuda_weight_bytes.restype = ctypes.c_int64
    return functions
