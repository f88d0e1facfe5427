"""The CUDA kernels without ONNX Runtime: the library's C functions by ctypes, random weights, torch's device pointers.

Used by cuda_kernels.py and tests/runtime/cuda/test_gpu.py. Everything but DeviceWeight works without a GPU and
without torch.
"""

import ctypes
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

ELEMENTS = {"fp16": 0, "bf16": 1, "fp32": 2}
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}
ROUTES = {"plan": -1, "decode": 0, "dequantize": 1, "hopper": 2}
ROUTE_NAMES = {number: name for name, number in ROUTES.items()}
# Routes to leave out, by name, separated by commas: a kernel that faults takes its whole process with it.
EXCLUDED = set(filter(None, os.environ.get("QCOMPILE_WITHOUT_ROUTES", "").split(",")))
CHOSEN = [name for name in ROUTES if name not in EXCLUDED]
GUARD = 256  # elements before and behind an output that must stay as they were


@dataclass(frozen=True)
class Plan:
    """qcompile_cuda_plan's answer, in its order."""

    route: int
    tokens: int
    block_n: int
    stages: int
    threads: int
    split: int
    grid_n: int
    grid_m: int
    shared_bytes: int
    chunk: int
    scratch_bytes: int
    counters: int

    def __str__(self) -> str:
        if ROUTE_NAMES[self.route] == "dequantize":
            return f"dequantize, {self.chunk} columns at a time"
        grid = f"{self.grid_n} × {self.split} × {self.grid_m}"
        tile = f"{self.block_n} × {self.tokens}"
        return f"{ROUTE_NAMES[self.route]} {tile}, {self.stages} stages, grid {grid}, {self.shared_bytes / 1024:.0f} KB"


def torch_dtype(element: str) -> Any:
    """torch's name of an element type."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[element]


class CudaError(RuntimeError):
    """What the library says of a failed call."""


class Library:
    """The C functions of runtime/kernels/cuda/c_api.h."""

    def __init__(self, path: Path | str) -> None:
        self.functions = ctypes.CDLL(str(path))
        strings = ("qcompile_cuda_error", "qcompile_cuda_architectures")
        for name in strings:
            self._declare(name, ctypes.c_char_p)
        shape = [*[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int]  # k, n, block_size, bits, element
        pointer, wide = ctypes.c_void_p, ctypes.c_int64
        self._declare("qcompile_cuda_devices", ctypes.c_int)
        self._declare("qcompile_cuda_layout", ctypes.c_int, *shape, pointer)
        self._declare(
            "qcompile_cuda_plan", ctypes.c_int, *shape, wide, pointer,
            ctypes.c_double, ctypes.c_double, ctypes.c_int, ctypes.c_int, pointer, pointer,
        )  # fmt: skip
        self._declare("qcompile_cuda_weight_create", pointer, *shape, ctypes.c_int, pointer, pointer, pointer)
        self._declare("qcompile_cuda_weight_destroy", None, pointer)
        self._declare("qcompile_cuda_weight_bytes", wide, pointer)
        self._declare("qcompile_cuda_weight_scratch", wide, pointer, wide, ctypes.c_int, pointer)
        self._declare(
            "qcompile_cuda_weight_multiply", ctypes.c_int,
            pointer, pointer, wide, pointer, pointer, pointer, pointer, wide, ctypes.c_int,
        )  # fmt: skip

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self.functions, name)
        function.restype, function.argtypes = result, list(arguments)

    def error(self) -> str:
        """What went wrong last in this thread."""
        return bytes(self.functions.qcompile_cuda_error()).decode()

    def architectures(self) -> list[str]:
        """Those compiled in, such as "90a" and "90-virtual"; none in a build without CUDA."""
        listed = bytes(self.functions.qcompile_cuda_architectures()).decode()
        return [name for name in listed.split(",") if name]

    def devices(self) -> int:
        """GPUs that can be used; 0 without a driver."""
        return int(self.functions.qcompile_cuda_devices())

    def why_no_device(self) -> str:
        """Why devices() is 0."""
        return "no GPU or no driver" if self.architectures() else "the library was built without CUDA"

    def plan(
        self, shape: "Shape", m: int, machine: "Machine", *, hopper: bool = True, route: str = "plan"
    ) -> tuple[Plan, float]:
        """The plan for m rows on a machine with cuBLAS, and its predicted seconds; CudaError where there is none."""
        numbers, predicted = (ctypes.c_int64 * len(fields(Plan)))(), ctypes.c_double()
        described = (ctypes.c_int64 * 4)(*machine.numbers)
        rates = (machine.bytes_per_second, machine.half_per_second)
        available = 1 + 2 * (hopper and machine.architecture == 90)
        code = self.functions.qcompile_cuda_plan(
            *shape.numbers, m, described, *rates, available, ROUTES[route], numbers, ctypes.byref(predicted)
        )
        if code:
            raise CudaError(f"no plan of route {route} for {m} rows of {shape}")
        return Plan(*numbers), predicted.value


@dataclass(frozen=True)
class Machine:
    """A GPU as plan.h sees it. Rates: what copies and products of cuBLAS reach, not what a datasheet says."""

    name: str
    multiprocessors: int
    architecture: int
    shared_bytes: int  # of one block
    shared_total: int  # of one multiprocessor
    bytes_per_second: float
    half_per_second: float

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.multiprocessors, self.architecture, self.shared_bytes, self.shared_total


@dataclass(frozen=True)
class Shape:
    """A weight (K, N), its grid and what x, bias and y are."""

    k: int
    n: int
    group: int = 128
    bits: int = 4
    element: str = "fp16"

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        return self.k, self.n, self.group, self.bits, ELEMENTS[self.element]

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def floor_bytes(self, m: int, *, zero_points: bool = False) -> int:
        """Bytes that a product must move: codes and scales of 2 bytes (4 for fp32), x (m, k) once and y (m, n) once."""
        width = DTYPES[self.element].itemsize
        zeros = self.groups * self.n * self.bits // 8 if zero_points else 0
        return self.k * self.n * self.bits // 8 + self.groups * self.n * width + zeros + m * (self.k + self.n) * width

    def __str__(self) -> str:
        return f"{self.k} × {self.n} g{self.group} int{self.bits} {self.element}"


class Weight:
    """Random codes, scales and zero points of a shape, as a file holds them (packing.h)."""

    def __init__(self, shape: Shape, *, zero_points: bool = False, signed: bool = False, seed: int = 0) -> None:
        self.shape, self.signed, self.rng = shape, signed, np.random.default_rng(seed)
        levels = 1 << shape.bits
        self.low = -levels // 2 if signed else 0
        # Without zero points unsigned codes mean themselves, 0 … 15: a weight whose mean is far from zero.
        self.codes = self._draw((shape.k, shape.n), levels)
        self.zero_point = self._draw((shape.groups, shape.n), levels) if zero_points else None
        scale = self.rng.uniform(0.5, 1.5, (shape.groups, shape.n)) / (levels / 4 * np.sqrt(shape.k))
        self.scale = scale.astype(DTYPES[shape.element])

    def _draw(self, shape: tuple[int, int], levels: int) -> npt.NDArray[np.uint8]:
        """Stored codes: two's complement where signed."""
        drawn = self.rng.integers(0, levels, shape, dtype=np.int16) + self.low
        return (drawn & (levels - 1)).astype(np.uint8)

    def _values(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        values = stored.astype(np.float64)
        return values - (values >= -self.low) * 2 * -self.low if self.signed else values

    def _stored(self, codes: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8] | None:
        if codes is None or self.shape.bits == 8:
            return codes
        flat = codes.reshape(-1)
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        return np.ascontiguousarray(flat[::2] | flat[1::2] << 4)

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
        """codes, scale and zero points for the library."""
        codes = self._stored(self.codes)
        assert codes is not None
        return codes, np.ascontiguousarray(self.scale), self._stored(self.zero_point)

    def columns(self, columns: slice = slice(None)) -> npt.NDArray[np.float64]:
        """Columns of W (K, columns) in float64."""
        rows = np.arange(self.shape.k) // self.shape.group
        centred = self._values(self.codes[:, columns])
        if self.zero_point is not None:
            centred -= self._values(self.zero_point[:, columns])[rows]
        return centred * self.scale[:, columns].astype(np.float64)[rows]


class DeviceWeight:
    """A weight in the kernels' layout on the current device, and products with torch tensors there."""

    def __init__(self, library: Library, weight: Weight) -> None:
        self.library, self.shape, self.handle = library, weight.shape, None
        addresses = [None if a is None else a.ctypes.data for a in weight.arrays]
        create = library.functions.qcompile_cuda_weight_create
        self.handle = create(*weight.shape.numbers, int(weight.signed), *addresses)
        if not self.handle:
            raise CudaError(library.error())

    def __del__(self) -> None:
        if self.handle:
            self.library.functions.qcompile_cuda_weight_destroy(self.handle)

    @property
    def bytes(self) -> int:
        return int(self.library.functions.qcompile_cuda_weight_bytes(self.handle))

    def scratch(self, m: int, route: str = "plan") -> tuple[int, Plan]:
        """Bytes of scratch for m rows, and the plan; CudaError where the route cannot be taken."""
        numbers = (ctypes.c_int64 * len(fields(Plan)))()
        wanted = int(self.library.functions.qcompile_cuda_weight_scratch(self.handle, m, ROUTES[route], numbers))
        if wanted < 0:
            raise CudaError(self.library.error())
        return wanted, Plan(*numbers)

    def multiply(self, x: Any, y: Any, scratch: Any, *, bias: Any = None, route: str = "plan") -> None:
        """y (m, n) = x (m, k) W + bias on torch's current stream; scratch is a uint8 tensor on the device."""
        import torch

        code = self.library.functions.qcompile_cuda_weight_multiply(
            self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), None if bias is None else bias.data_ptr(),
            torch.cuda.current_stream().cuda_stream, scratch.data_ptr(), scratch.numel(), ROUTES[route],
        )  # fmt: skip
        if code:
            raise CudaError(self.library.error())
