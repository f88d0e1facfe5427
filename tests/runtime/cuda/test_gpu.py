"""The CUDA kernels on a GPU, through the library's C functions: against float64, twice, in graphs, on two streams.

Unverified until a GPU ran them: no machine of this project's tests has one, so here they are skipped, and say why.
`benchmarks/gpu_session.sh` runs them where there is one. Nothing here needs ONNX Runtime.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_harness import CHOSEN, EXCLUDED, GUARD, ROUTES, CudaError, DeviceWeight, Library, Shape, Weight, torch_dtype

from qcompile.passes.library import library_path

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 257, 1024)
# Errors of a row (Product.error). fp16 and bf16 round each weight where it is scaled before the product, and y; fp32
# rounds each row of x to fp16. Rounding alone gives 3e-4 (bf16: 2.5e-3).
LIMITS = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 1e-3}
SHAPES = {
    "even": (4096, 512, 128),
    "ragged": (1000, 333, 128),
    "tiny": (70, 13, 32),
    "groups of 64": (2048, 264, 64),
    "groups of 256": (1536, 192, 256),
    "groups of 48": (960, 130, 48),
    "groups of 16": (512, 72, 16),
    "per column": (1111, 200, 1111),
    "deep": (14336, 128, 128),
    "wide": (128, 5000, 32),
}


def _absent(reason: str) -> None:
    """Skip; with QCOMPILE_REQUIRE_GPU=1, where a GPU was wanted, fail."""
    (pytest.fail if os.environ.get("QCOMPILE_REQUIRE_GPU") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def torch() -> Any:
    torch = pytest.importorskip("torch", reason="the tests hold device memory through torch")
    if not torch.cuda.is_available():
        _absent("torch finds no CUDA device")
    return torch


@pytest.fixture(scope="module")
def library(torch: Any) -> Library:
    loaded = Library(library_path())
    if not loaded.devices():
        _absent(f"the library finds no CUDA device: {loaded.why_no_device()}")
    return loaded


class Product:
    """One weight on the device with its float64 values, and products whose outputs are poisoned and guarded."""

    def __init__(self, torch: Any, library: Library, weight: Weight, *, bias: bool = False) -> None:
        self.torch, self.shape = torch, weight.shape
        self.dtype = torch_dtype(weight.shape.element)
        self.weight = DeviceWeight(library, weight)
        self.w64 = torch.from_numpy(weight.columns()).cuda()
        self.bias = torch.randn(weight.shape.n, device="cuda").to(self.dtype) if bias else None
        self.generator = torch.Generator("cuda").manual_seed(1)

    def x(self, m: int) -> Any:
        """Rows with outlier channels, NaN right behind the last: reading on would show. fp32: of many magnitudes."""
        k = self.shape.k
        x = self.torch.randn(m, k, device="cuda", generator=self.generator)
        x[:, :: max(1, k // 7)] *= 20
        if self.shape.element == "fp32":
            x *= 10.0 ** (self.torch.rand(m, 1, device="cuda", generator=self.generator) * 12 - 6)
        buffer = self.torch.full((m * k + GUARD,), float("nan"), device="cuda", dtype=self.dtype)
        buffer[: m * k] = x.reshape(-1)
        return buffer[: m * k].view(m, k)

    def run(self, x: Any, route: str = "plan") -> Any:
        """y (m, n), from an output of NaN and scratch of ones, with the zones around y checked."""
        m, n = len(x), self.shape.n
        wanted, _ = self.weight.scratch(m, route)
        scratch = self.torch.full((max(wanted, 1),), 255, device="cuda", dtype=self.torch.uint8)
        buffer = self.torch.full((m * n + 2 * GUARD,), float("nan"), device="cuda", dtype=self.dtype)
        y = buffer[GUARD : GUARD + m * n].view(m, n)
        self.weight.multiply(x, y, scratch[:wanted], bias=self.bias, route=route)
        self.torch.cuda.synchronize()
        assert bool(buffer[:GUARD].isnan().all()), "written before y"
        assert bool(buffer[GUARD + m * n :].isnan().all()), "written behind y"
        return y

    def error(self, x: Any, y: Any) -> float:
        """The worst row's error against float64, relative to what |y| is where signs are random: no sum cancels."""
        wanted, squares = x.double() @ self.w64, x.double() ** 2 @ self.w64**2
        if self.bias is not None:
            wanted, squares = wanted + self.bias.double(), squares + self.bias.double() ** 2
        return float(((y.double() - wanted).norm(dim=1) / squares.sum(dim=1).sqrt()).max())

    def routes(self, m: int) -> Iterator[str]:
        """The plan's own choice, and every route that this weight can take here."""
        for route in CHOSEN:
            try:
                self.weight.scratch(m, route)
            except CudaError:
                continue
            yield route


def _cases() -> Iterator[Any]:
    """Every shape in every element type and width of codes; zero points, signs and biases take turns."""
    for i, (name, sizes) in enumerate(SHAPES.items()):
        for j, element in enumerate(LIMITS):
            for bits in (4, 8):
                turn = i + j + bits // 4
                shape = Shape(*sizes, bits=bits, element=element)
                options = {"zero_points": turn % 2 == 0, "signed": turn % 3 == 0, "bias": turn % 2 == 1}
                yield pytest.param(shape, options, id=f"{name}-{element}-int{bits}")


@pytest.mark.parametrize(("shape", "options"), _cases())
def test_every_route_against_float64_and_twice_the_same(
    torch: Any, library: Library, shape: Shape, options: dict[str, bool]
) -> None:
    weight = Weight(shape, zero_points=options["zero_points"], signed=options["signed"])
    product = Product(torch, library, weight, bias=options["bias"])
    checked = set()
    for m in ROWS:
        x = product.x(m)
        for route in product.routes(m):
            y = product.run(x, route)
            assert product.error(x, y) <= LIMITS[shape.element], f"{route}, {m} rows"
            assert torch.equal(product.run(x, route), y), f"{route}, {m} rows: the second run differs"
            checked.add(route)
    missing = {"plan", "decode", "dequantize"} - EXCLUDED - checked
    assert not missing, "is there no libcublas? torch's own packages bring it"


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_that_is_not_finite_spoils_no_other(torch: Any, library: Library, route: str) -> None:
    product = Product(torch, library, Weight(Shape(512, 136, 128), zero_points=True))
    x = product.x(40)
    x[3, 100], x[17, 7] = float("nan"), float("inf")
    if route not in product.routes(40):
        pytest.skip(f"no route {route} on this device")
    y = product.run(x, route)
    assert bool(y[3].isnan().all())
    assert not bool(y[17].isfinite().any())
    kept = [i for i in range(40) if i not in (3, 17)]
    assert product.error(x[kept], y[kept]) <= LIMITS["fp16"]


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("element", LIMITS)
def test_graph_replays_with_changed_inputs(torch: Any, library: Library, element: str, m: int) -> None:
    """Captured once, replayed: counters of split sums are zeros again, and no pointer to a host value is kept."""
    product = Product(torch, library, Weight(Shape(4096, 256, 128, element=element)), bias=True)
    x, y = product.x(m), torch.empty(m, 256, device="cuda", dtype=product.dtype)
    scratch = torch.empty(max(product.weight.scratch(m)[0], 1), device="cuda", dtype=torch.uint8)
    product.run(x)  # what is done once is done before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product.weight.multiply(x, y, scratch, bias=product.bias)
    for _ in range(5):
        x.copy_(product.x(m))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, product.run(x))


@pytest.mark.parametrize("m", [1, 8, 64, 300])
def test_two_streams_at_once(torch: Any, library: Library, m: int) -> None:
    """One weight, two streams: nothing that the products write belongs to the weight."""
    product = Product(torch, library, Weight(Shape(8192, 512, 128)))
    inputs = [product.x(m), product.x(m)]
    wanted = [product.run(x) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    size = max(product.weight.scratch(m)[0], 1)
    scratch = [torch.empty(size, device="cuda", dtype=torch.uint8) for _ in streams]
    found = [[torch.full_like(y, float("nan")) for _ in range(50)] for y in wanted]
    torch.cuda.synchronize()
    for turn in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                product.weight.multiply(inputs[i], found[i][turn], scratch[i])
    torch.cuda.synchronize()
    for i, y in enumerate(wanted):
        assert all(torch.equal(one, y) for one in found[i])


def test_too_little_scratch_is_refused_and_no_rows_are_nothing(torch: Any, library: Library) -> None:
    product = Product(torch, library, Weight(Shape(250, 64, 128)))  # K is filled up: x is prepared in scratch
    x, y = product.x(100), torch.full((100, 64), 7.0, device="cuda", dtype=torch.float16)
    none = torch.empty(0, device="cuda", dtype=torch.uint8)
    with pytest.raises(CudaError, match="scratch"):
        product.weight.multiply(x, y, none)
    product.weight.multiply(x[:0], y, none)
    assert bool((y == 7).all())


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(library: Library, tool: str) -> None:
    """A few products of every route in a process of their own, under one tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        pytest.skip("no compute-sanitizer")
    script = Path(__file__).parents[3] / "benchmarks" / "cuda_sanitize.py"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script), str(library_path())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not know this machine's devices")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-1000:]
    assert " products" in done.stdout
