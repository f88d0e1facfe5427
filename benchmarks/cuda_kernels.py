"""The CUDA kernels on one GPU: µs, GB/s, TFLOP/s and the share of the floor, beside cuBLAS and ONNX Runtime.

    python benchmarks/cuda_kernels.py [--library FILE] [--quick] [--output FOLDER]
    python benchmarks/cuda_kernels.py --plan [--output FOLDER]    needs no GPU: plans, predictions, registers

How it is measured
- Without ONNX Runtime: the library's C functions on torch's device pointers. Rivals: fp16 products of cuBLAS through
  torch, and MatMulNBits where this Python has an onnxruntime with the CUDA provider (cuda_rivals.py).
- A CUDA graph holds one product for each of R weights, which together exceed three times the L2 cache, so that every
  weight comes from memory as in decoding. The time is a replay's, divided by R; the median of the replays.
- floor = max(bytes / bandwidth, 2·M·K·N / rate): bytes of codes, scales, zero points, x and y, each once; bandwidth
  of a copy (bytes read and written) and rate of an 8192³ fp16 product, both measured in the same run.
- Every time is of a product that was compared with float64 before, on 256 columns. A wrong one is told, not timed.
"""

import argparse
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import cuda_plans
from cuda_harness import CHOSEN, ROUTE_NAMES, CudaError, DeviceWeight, Library, Shape, Weight, torch_dtype
from cuda_plans import SHAPES

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_ROWS = (1, 8, 16, 64, 256, 1024)
OPTION_ROWS = (1, 16, 64, 256)
CHECKED = slice(0, 256)  # columns compared with float64
LIMITS = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 1e-3}
# Issue 5, for H100 and H200 at g128: µs up to M = 64 (accepted, aimed at), then shares of the dense rate in %.
BARS = {
    (4096, 4096): ({8: (6.5, 5.0), 16: (7, 5.5), 64: (9, 7)}, (45, 60)),
    (4096, 14336): ({8: (15, 12.5), 16: (16, 13.5), 64: (24, 18)}, (55, 70)),
    (8192, 28672): ({8: (50, 45), 16: (53, 47), 64: (80, 62)}, (60, 75)),
}


def bar(shape: Shape, m: int, seconds: float, dense: float) -> str:
    """What issue 5 asks for and whether it is met; empty where it asks for nothing."""
    small, large = BARS.get((shape.k, shape.n), ({}, None))
    if m >= 256 and large:
        share = 2 * m * shape.k * shape.n / seconds / dense * 100
        return f"{share:.0f} % of {large[0]} ({large[1]}): {'met' if share >= large[0] else 'missed'}"
    asked = next((times for rows, times in small.items() if m == rows or m <= rows == 8), None)
    return f"{asked[0]} ({asked[1]}): {'met' if seconds * 1e6 <= asked[0] else 'missed'}" if asked else ""


class Device:
    """The GPU: its name, what its memory and its tensor cores reach, and the time of a graph of products."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        properties = torch.cuda.get_device_properties(0)
        self.name, self.cache = properties.name, properties.L2_cache_size
        self.bandwidth, self.rate = self._copy_bandwidth(1 << 31), self._product_rate(8192)

    def _copy_bandwidth(self, size: int) -> float:
        """Bytes read and written in a second."""
        source = self.torch.empty(size, device="cuda", dtype=self.torch.uint8)
        target = self.torch.empty_like(source)
        return 2 * size / self.seconds([lambda: target.copy_(source)])

    def _product_rate(self, size: int) -> float:
        """Operations in a second of a square fp16 product."""
        a = self.torch.randn(size, size, device="cuda").half()
        b, c = self.torch.randn_like(a), self.torch.empty_like(a)
        return 2 * size**3 / self.seconds([lambda: self.torch.mm(a, b, out=c)])

    def copies(self, size: int) -> int:
        """How many weights of `size` bytes exceed the cache three times; at least 2."""
        return max(2, math.ceil(3 * self.cache / size))

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Median time of one call in replays of a graph of all of them; at least 12 replays, 0.1 s.

        At least 16 calls make a graph, and a wait goes before it: a launch reaches an idle device some microseconds
        after the event that begins the time.
        """
        torch = self.torch
        calls = calls * math.ceil(16 / len(calls))
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times: list[float] = []
        while len(times) < 15 or (sum(times) < 0.1 and len(times) < 200):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(100_000)  # clocks: until all three are queued
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[3:]) / len(calls)

    def floor(self, shape: Shape, m: int, *, zero_points: bool = False) -> float:
        """Seconds below which no product of m rows runs."""
        moved = shape.floor_bytes(m, zero_points=zero_points) / self.bandwidth
        return max(moved, 2 * m * shape.k * shape.n / self.rate)


class Subject:
    """Copies of one weight on the device, more than the cache holds, and the time of products with them."""

    def __init__(self, device: Device, library: Library, shape: Shape, *, zero_points: bool, bias: bool) -> None:
        self.device, self.shape, torch = device, shape, device.torch
        self.dtype = torch_dtype(shape.element)
        weight = Weight(shape, zero_points=zero_points, signed=not zero_points)
        self.checked = torch.from_numpy(weight.columns(CHECKED)).cuda()
        first = DeviceWeight(library, weight)
        rest = device.copies(first.bytes) - 1
        self.weights = [first, *(DeviceWeight(library, weight) for _ in range(rest))]
        self.bias = torch.randn(shape.n, device="cuda").to(self.dtype) if bias else None

    def seconds(self, m: int, route: str = "plan") -> float:
        """Of one product of m rows; CudaError where the route cannot be taken, ValueError for a wrong result."""
        torch = self.device.torch
        x = torch.randn(m, self.shape.k, device="cuda").to(self.dtype)
        y = torch.full((m, self.shape.n), float("nan"), device="cuda", dtype=self.dtype)
        scratch = torch.empty(max(self.weights[0].scratch(m, route)[0], 1), device="cuda", dtype=torch.uint8)

        calls = [partial(w.multiply, x, y, scratch, bias=self.bias, route=route) for w in self.weights]
        calls[-1]()
        wanted = x.double() @ self.checked + (0 if self.bias is None else self.bias.double()[CHECKED])
        error = float((y[:, CHECKED].double() - wanted).norm() / wanted.norm())
        if not (error <= LIMITS[self.shape.element] and bool(y.isfinite().all())):
            raise ValueError(f"WRONG, error {error:.1e}")
        return self.device.seconds(calls)


def cublas_seconds(device: Device, shape: Shape, m: int) -> float:
    """Of torch's fp16 product, with weights rotated as ours are."""
    torch = device.torch
    copies = device.copies(shape.k * shape.n * 2)
    weights = [torch.randn(shape.k, shape.n, device="cuda", dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(m, shape.k, device="cuda", dtype=torch.float16)
    y = torch.empty(m, shape.n, device="cuda", dtype=torch.float16)
    return device.seconds([partial(torch.mm, x, weight, out=y) for weight in weights])


def main_table(device: Device, library: Library, rows: tuple[int, ...]) -> Iterator[str]:
    """Every shape and M: the planned kernel against the floor, issue 5 and cuBLAS, and each route forced."""
    routes = [name for number, name in ROUTE_NAMES.items() if number >= 0 and name in CHOSEN]
    yield "\n## fp16, g128, symmetric\n"
    yield "| shape | M | plan | µs | GB/s | TFLOP/s | of the floor | issue 5: wanted (aim) | cuBLAS µs | faster | " + (
        " | ".join(f"{route} µs" for route in routes) + " |"
    )
    yield "|---|--:|---|--:|--:|--:|--:|---|--:|--:|" + "--:|" * len(routes)
    for shape in SHAPES:
        subject = Subject(device, library, shape, zero_points=False, bias=False)
        for m in rows:
            rival = cublas_seconds(device, shape, m)
            chosen = subject.weights[0].scratch(m)[1]
            try:
                seconds = subject.seconds(m)
            except (CudaError, ValueError) as error:
                figures = f"{error} | | | | | {rival * 1e6:.1f} | "
            else:
                moved, done = shape.floor_bytes(m) / seconds, 2 * m * shape.k * shape.n / seconds
                figures = (
                    f"{seconds * 1e6:.1f} | {moved / 1e9:.0f} | {done / 1e12:.1f} | "
                    f"{device.floor(shape, m) / seconds:.0%} | {bar(shape, m, seconds, device.rate)} | "
                    f"{rival * 1e6:.1f} | {rival / seconds:.2f}×"
                )
            forced = [_cell(subject, m, route) for route in routes]  # last: what never ran may fault
            yield f"| {shape.k} × {shape.n} | {m} | {chosen} | {figures} | " + " | ".join(forced) + " |"


def _cell(subject: Subject, m: int, route: str) -> str:
    """µs of a route, or why there are none."""
    try:
        return f"{subject.seconds(m, route) * 1e6:.1f}"
    except CudaError:
        return "no"
    except ValueError as error:
        return str(error)


def option_table(device: Device, library: Library) -> Iterator[str]:
    """What zero points, a bias and other types cost: issue 5 allows 5 % for the first three."""
    base = SHAPES[1]
    kinds: dict[str, tuple[Shape, bool, bool]] = {
        "symmetric": (base, False, False),
        "zero points": (base, True, False),
        "bias": (base, False, True),
        "bf16": (replace(base, element="bf16"), False, False),
        "fp32": (replace(base, element="fp32"), False, False),
        "g32": (replace(base, group=32), False, False),
        "int8": (replace(base, bits=8), False, False),
    }
    yield f"\n## What options cost: {base.k} × {base.n}, µs (against symmetric fp16 g128)\n"
    yield "| | " + " | ".join(f"M = {m}" for m in OPTION_ROWS) + " |"
    yield "|---|" + "--:|" * len(OPTION_ROWS)
    plain: dict[int, float] = {}
    for name, (shape, zero_points, bias) in kinds.items():
        subject, cells = Subject(device, library, shape, zero_points=zero_points, bias=bias), []
        for m in OPTION_ROWS:
            try:
                seconds = subject.seconds(m)
            except (CudaError, ValueError) as error:
                cells.append(str(error))
                continue
            plain.setdefault(m, seconds)
            cells.append(f"{seconds * 1e6:.1f} ({seconds / plain[m] - 1:+.0%})")
        yield f"| {name} | " + " | ".join(cells) + " |"


def rival_table() -> Iterator[str]:
    """ONNX Runtime's MatMulNBits and our operator in its sessions, each in a process of its own."""
    script = Path(__file__).with_name("cuda_rivals.py")
    yield "\n## In sessions of ONNX Runtime\n"
    try:
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        yield "not measured: 5 minutes were not enough; run cuda_rivals.py alone"
        return
    yield done.stdout.strip() if done.returncode == 0 else f"not measured: {_last_line(done.stderr)}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def described(command: str) -> str:
    """The command and the commit that it was run at."""
    root = Path(__file__).parent.parent
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return f"{command}, commit {commit or 'unknown'}"


def card() -> str:
    """Name and driver as nvidia-smi has them; empty without it."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def measured(library: Library, rows: tuple[int, ...]) -> Iterator[str]:
    """Every table of a GPU."""
    device = Device()
    compiled = ", ".join(library.architectures())
    yield f"{card() or device.name}; torch {device.torch.__version__}; kernels for {compiled}."
    yield f"Copy {device.bandwidth / 1e12:.2f} TB/s, fp16 product {device.rate / 1e12:.0f} TFLOP/s, "
    yield f"L2 {device.cache / 2**20:.0f} MB."
    yield from main_table(device, library, rows)
    yield from option_table(device, library)
    yield from rival_table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, help="libqcompile_kernels.so (the installed one)")
    parser.add_argument("--plan", action="store_true", help="plans and predictions only; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="fewer M")
    parser.add_argument("--output", type=Path, help="folder of the table, named after the card; printed in any case")
    given = parser.parse_args()
    if given.library is None:
        from qcompile.passes.library import library_path

        given.library = library_path()
    library = Library(given.library)
    if given.plan:
        name, lines = "plans", plan_lines(library, given.library)
    elif library.devices():
        import torch

        name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
        lines = measured(library, QUICK_ROWS if given.quick else ROWS)
    else:
        parser.error(f"{library.why_no_device()}; --plan needs no GPU")
    title = f"# CUDA kernels: {name} ({date.today()})\n\n{described(' '.join(['python', *sys.argv]))}\n"
    file = None
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        file = (given.output / f"cuda-{name}.md").open("w", encoding="utf-8")
    for line in itertools.chain([title], lines):
        print(line, flush=True)
        if file:  # line by line: a run that is cut off leaves what it has
            print(line, file=file, flush=True)


def plan_lines(library: Library, path: Path) -> Iterator[str]:
    """What --plan prints."""
    yield "Nothing here ran on a GPU: predictions of plan.cpp, and what ptxas made of the kernels."
    yield from cuda_plans.plan_tables(library)
    yield from cuda_plans.route_table(library)
    if library.architectures():
        yield from cuda_plans.resource_table(path)


if __name__ == "__main__":
    main()
