"""What can be told of the CUDA kernels without a GPU: plans, predicted times, registers and shared memory."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cuda_harness import CudaError, Library, Machine, Shape

# Rates of the H100 and H200: measured by others on the machines that this project may be lent (a copy, an 8192³ product
# of bf16). The others: 0.9 and 0.8 of their datasheets' memory and dense fp16 rate (with fp32 sums), never measured.
MACHINES = (
    Machine("H100 SXM", 132, 90, 227 << 10, 228 << 10, 3.0e12, 798e12),
    Machine("H200", 132, 90, 227 << 10, 228 << 10, 4.3e12, 790e12),
    Machine("A100 80GB", 108, 80, 163 << 10, 164 << 10, 0.9 * 2.04e12, 0.8 * 312e12),
    Machine("RTX 4090", 128, 89, 99 << 10, 100 << 10, 0.9 * 1.008e12, 0.8 * 165e12),
)
SHAPES = (Shape(4096, 4096), Shape(4096, 14336), Shape(8192, 28672))
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def floor_seconds(shape: Shape, m: int, machine: Machine, *, zero_points: bool = False) -> float:
    """The larger of the times that the bytes and the operations take at the machine's rates."""
    moved = shape.floor_bytes(m, zero_points=zero_points) / machine.bytes_per_second
    return max(moved, 2 * m * shape.k * shape.n / machine.half_per_second)


def plan_tables(library: Library) -> Iterator[str]:
    """One table a machine: for each M and shape the plan, its predicted µs and the floor's share of them."""
    for machine in MACHINES:
        rates = f"{machine.bytes_per_second / 1e12:.2f} TB/s, {machine.half_per_second / 1e12:.0f} TFLOP/s"
        yield f"\n## {machine.name}: {machine.multiprocessors} multiprocessors, {rates}\n"
        yield "| shape | M | plan | predicted µs | floor µs | floor / predicted |"
        yield "|---|--:|---|--:|--:|--:|"
        for shape in SHAPES:
            for m in ROWS:
                plan, predicted = library.plan(shape, m, machine)
                floor = floor_seconds(shape, m, machine)
                times = f"{predicted * 1e6:.1f} | {floor * 1e6:.1f} | {floor / predicted:.0%}"
                yield f"| {shape.k} × {shape.n} | {m} | {plan} | {times} |"


def route_table(library: Library) -> Iterator[str]:
    """Predicted µs of every route on the first machine, where they meet."""
    machine, routes = MACHINES[0], ("decode", "dequantize", "hopper")
    yield f"\n## Predicted µs of each route, {machine.name}\n"
    yield "| shape | M | " + " | ".join(routes) + " |"
    yield "|---|--:|" + "--:|" * len(routes)
    for shape in SHAPES:
        for m in ROWS:
            cells = []
            for route in routes:
                try:
                    cells.append(f"{library.plan(shape, m, machine, route=route)[1] * 1e6:.1f}")
                except CudaError:
                    cells.append("no")
            yield f"| {shape.k} × {shape.n} | {m} | " + " | ".join(cells) + " |"


def cuobjdump() -> str | None:
    """The disassembler: on the path, or of the package nvidia-cuda-cuobjdump beside this Python."""
    beside = (Path(folder, "nvidia", version, "bin") for folder in sys.path for version in ("cu13", "cu12"))
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, beside)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def resources(library: Path) -> list[tuple[str, str, int, int, int]]:
    """(kernel, architecture, registers, stack bytes, static shared bytes) of every kernel in the library."""
    tool = cuobjdump()
    if not tool:
        raise FileNotFoundError("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [tool, "--dump-resource-usage", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture, name = [], "", ""
    for line in output.splitlines():
        if "arch = " in line:
            architecture = line.split("= ")[1].strip()
        elif "Function " in line:
            name = line.split("Function ")[1].strip().rstrip(":")
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found.append((name, architecture, numbers["REG"], numbers["STACK"], numbers["SHARED"]))
    return sorted(found)


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names and what c++filt makes of them, without parameters; themselves where there is no c++filt."""
    tool = shutil.which("c++filt")
    if not tool:
        return dict(zip(names, names, strict=True))
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    rest = re.compile(r"^void |qcompile::cuda::|\(anonymous namespace\)::|\((?!.*>\().*$")
    return dict(zip(names, (rest.sub("", line) for line in plain.splitlines()), strict=True))


def resource_table(library: Path) -> Iterator[str]:
    """Registers of every kernel by architecture."""
    rows = resources(library)
    names = readable([row[0] for row in rows])
    architectures = sorted({row[1] for row in rows})
    registers: dict[str, dict[str, int]] = {}
    for name, architecture, count, *_ in rows:
        registers.setdefault(_element(names[name]), {})[architecture] = count
    stacks = sum(row[3] > 0 for row in rows)
    yield "\n## Registers a thread\n"
    yield f"{len(rows)} kernels, {stacks} with a stack frame. decode_kernel<type, bits, tokens / 8>;"
    yield "hopper_kernel<type, tokens>. Dynamic shared memory: see the plans."
    yield "\n| kernel | " + " | ".join(architectures) + " |"
    yield "|---|" + "--:|" * len(architectures)
    for name, counts in sorted(registers.items()):
        yield f"| `{name}` | " + " | ".join(str(counts.get(a, "")) for a in architectures) + " |"


def _element(name: str) -> str:
    """With layout.h's enumeration in words."""
    for number, word in enumerate(("fp16", "bf16", "fp32")):
        name = re.sub(rf"\((?:qcompile::cuda::)?Element\){number}", word, name)
    return name
