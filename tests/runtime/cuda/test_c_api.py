"""The C entry points of the CUDA side without a GPU: emulated, without CUDA, and as the library is built here."""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_host import c_functions, on_host, without_cuda
from kernel_builds import build_kernel_check
from native_models import OPERATORS, Case, native_library, open_session, relative

from qcompile.runtime.library import cuda_architectures, cuda_devices, why_no_cuda

HALF = 6e-4  # relative error of a product in fp16


@pytest.fixture(scope="module")
def library() -> Path:
    return on_host()


def _create(functions: Any, case: Case, **changes: Any) -> int | None:
    """A weight of the case, float16; changes: arguments by name."""
    values = {name: getattr(case, name) for name in ("k", "n", "block_size", "bits")} | {"element": 0, "signed": 0}
    values |= changes
    sizes = [ctypes.c_int64(values[name]) for name in ("k", "n", "block_size")]
    numbers = [values[name] for name in ("bits", "element", "signed")]
    raw = {name: case.tensor(name).raw_data for name in case.arrays} | changes
    return functions.qcompile_cuda_weight_create(*sizes, *numbers, raw["w"], raw["scale"], raw.get("zero_point"))


def _product(
    functions: Any, weight: int | None, x: np.ndarray, y: np.ndarray, scratch: np.ndarray, **changes: int
) -> int:
    """scratch: bytes, the first of which is aligned. changes: m, route."""
    m, route = changes.get("m", x.shape[0]), changes.get("route", -1)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, y, scratch)]
    handle = ctypes.c_void_p(weight)
    size = ctypes.c_int64(scratch.size)
    return int(
        functions.qcompile_cuda_weight_multiply(
            handle, pointers[0], ctypes.c_int64(m), pointers[1], None, None, pointers[2], size, route
        )
    )


def _aligned(size: int) -> np.ndarray:
    raw = np.empty(size + 256, np.uint8)
    offset = -raw.ctypes.data % 256
    return raw[offset : offset + size]


def test_products(library: Path) -> None:
    functions, case = c_functions(library), Case(half=True)
    weight = _create(functions, case)
    plan = (ctypes.c_int64 * 12)()
    size = functions.qcompile_cuda_weight_scratch(ctypes.c_void_p(weight), ctypes.c_int64(5), -1, plan)
    assert size > 0
    assert plan[4] % 32 == 0 < plan[4], "threads"
    assert functions.qcompile_cuda_weight_bytes(ctypes.c_void_p(weight)) > case.k * case.n // 2
    x, y, scratch = case.x(5), np.zeros((5, case.n), np.float16), _aligned(size)
    assert _product(functions, weight, x, y, scratch) == 0
    assert relative(y, case.expected(x)) < HALF
    y[:] = 7
    assert _product(functions, weight, x, y, scratch, m=0) == 0
    assert (y == 7).all()
    assert _product(functions, weight, x, y, scratch[:-1]) == 1
    assert b"scratch_bytes is less" in functions.qcompile_cuda_error()
    assert _product(functions, weight, x, y, scratch[1:]) == 1
    assert b"256-byte aligned" in functions.qcompile_cuda_error()
    for changes, word in (({"m": -1}, b"m is negative"), ({"route": 3}, b"route must be"), ({"route": -2}, b"route")):
        assert _product(functions, weight, x, y, scratch, **changes) == 1
        assert word in functions.qcompile_cuda_error()
    assert _product(functions, None, x, y, scratch) == 1
    assert b"weight is null" in functions.qcompile_cuda_error()
    functions.qcompile_cuda_weight_destroy(ctypes.c_void_p(weight))


@pytest.fixture
def hopper(library: Path) -> Iterator[Any]:
    """The functions, on an emulated device of sm_90."""
    functions = c_functions(library)
    functions.qcompile_check_architecture(90)
    yield functions
    functions.qcompile_check_architecture(86)


@pytest.mark.parametrize("route", [0, 2])
@pytest.mark.parametrize("zero_point", [True, False])
def test_routes(hopper: Any, route: int, zero_point: bool) -> None:
    """Decode and Hopper kernels as plans cut them, from scratch of poison; cuBLAS is weight_check's."""
    functions = hopper
    case = Case("MatMulInt4", 1600, 200, 64, half=True, zero_point=zero_point)
    weight, plan = _create(functions, case), (ctypes.c_int64 * 12)()
    assert functions.qcompile_cuda_weight_scratch(ctypes.c_void_p(weight), ctypes.c_int64(0), route, plan) == 0
    for rows in (1, 40, 130):
        size = functions.qcompile_cuda_weight_scratch(ctypes.c_void_p(weight), ctypes.c_int64(rows), route, plan)
        assert plan[0] == route, functions.qcompile_cuda_error()
        x, y, scratch = case.x(rows), np.full((rows, case.n), np.nan, np.float16), _aligned(max(size, 1))
        scratch[:] = 255
        assert _product(functions, weight, x, y, scratch, route=route) == 0, functions.qcompile_cuda_error()
        assert relative(y, case.expected(x)) < HALF, f"{rows} rows"
    assert functions.qcompile_cuda_weight_scratch(ctypes.c_void_p(weight), ctypes.c_int64(1), 1, plan) == -1
    assert b"needs cuBLAS" in functions.qcompile_cuda_error()
    functions.qcompile_cuda_weight_destroy(ctypes.c_void_p(weight))


@pytest.mark.parametrize("changes", [{"k": 0}, {"n": -1}, {"bits": 5}, {"element": 3}, {"w": None}, {"scale": None}])
def test_bad_weights(library: Path, changes: dict[str, Any]) -> None:
    functions = c_functions(library)
    assert _create(functions, Case(half=True), **changes) is None
    assert functions.qcompile_cuda_error()


def test_without_cuda(tmp_path: Path) -> None:
    library = without_cuda(tmp_path)
    functions = c_functions(library)
    assert cuda_devices(library) == 0
    assert cuda_architectures(library) == []
    assert _create(functions, Case(half=True)) is None
    assert b"built without CUDA" in functions.qcompile_cuda_error()
    assert functions.qcompile_cuda_weight_scratch(None, ctypes.c_int64(1), -1, None) == -1
    assert _product(functions, None, np.ones(1), np.ones(1), _aligned(1)) == 1


@pytest.fixture(scope="module")
def cuda_build() -> Path:
    library = native_library()
    if not cuda_architectures(library):
        pytest.skip("the library was built without CUDA")
    if cuda_devices(library):
        pytest.skip("there is a GPU: tests/runtime/cuda/test_gpu.py")
    return library


def test_a_machine_without_a_gpu_is_told_so(cuda_build: Path) -> None:
    functions = c_functions(cuda_build)
    assert _create(functions, Case(half=True)) is None
    assert re.search(rb"driver|device", functions.qcompile_cuda_error())
    assert all(re.fullmatch(r"\d+a?(-virtual)?", name) for name in cuda_architectures(cuda_build))
    assert "no GPU" in (why_no_cuda(cuda_build) or "")


@pytest.mark.slow
def test_cpu_sessions_are_those_of_a_build_without_cuda(cuda_build: Path) -> None:
    """To the bit; tests/runtime/test_operators.py runs with the library as it is built, too."""
    plain = build_kernel_check("without_cuda", "-DQCOMPILE_CUDA=OFF", target="qcompile_kernels")
    without = plain / "libqcompile_kernels.so"
    assert cuda_architectures(without) == []
    for op in OPERATORS:
        for half in (False, True):
            case = Case(op, half=half)
            x = case.x(2, 9)
            (a,), (b,) = (open_session(case.model(), lib).run(None, {"x": x}) for lib in (cuda_build, without))
            np.testing.assert_array_equal(a, b)
