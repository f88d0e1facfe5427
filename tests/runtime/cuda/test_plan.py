"""Plans of the CUDA products (runtime/kernels/cuda/plan.h), by the library's C function; no GPU is needed."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import native_library

DECODE, DEQUANTIZE, HOPPER = 0, 1, 2
CUBLAS, HOPPER_KERNELS = 1, 2  # bits of `available`
NAMES = ("route", "tokens", "block_n", "stages", "threads", "split", "grid_n", "grid_m", "shared_bytes", "chunk")
NAMES += ("scratch_bytes", "counters")
UNIT = 256  # k that a CTA of the decode kernel takes at a time
MAX_ROWS = 1 << 18  # of one launch
CHUNK_BYTES = 24 << 20
KILO = 1024


@dataclass(frozen=True)
class Machine:
    multiprocessors: int
    architecture: int
    shared_bytes: int  # of one block, at most
    shared_total: int  # of one multiprocessor
    bytes_per_second: float
    half_per_second: float


MACHINES = {
    "A100": Machine(108, 80, 163 * KILO, 164 * KILO, 2.0e12, 312e12),
    "RTX 3090": Machine(82, 86, 99 * KILO, 100 * KILO, 0.94e12, 71e12),
    "L40S": Machine(142, 89, 99 * KILO, 100 * KILO, 0.86e12, 362e12),
    "H100": Machine(132, 90, 227 * KILO, 228 * KILO, 3.35e12, 989e12),
}


@dataclass(frozen=True)
class Weight:
    k: int
    n: int
    block_size: int = 128
    bits: int = 4
    element: int = 0

    @property
    def padded_n(self) -> int:
        return -(-self.n // 64) * 64


@dataclass(frozen=True)
class Plan:
    values: dict[str, int]
    seconds: float

    def __getattr__(self, name: str) -> int:
        return self.values[name]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(native_library()))
    loaded.qcompile_cuda_error.restype = ctypes.c_char_p
    weight = [*[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int]  # k, n, block_size, bits, element
    loaded.qcompile_cuda_layout.argtypes = [*weight, ctypes.c_void_p]
    loaded.qcompile_cuda_plan.argtypes = [*weight, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_double]
    loaded.qcompile_cuda_plan.argtypes += [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


def _numbers(weight: Weight) -> tuple[int, ...]:
    return weight.k, weight.n, weight.block_size, weight.bits, weight.element


def _padded_k(library: ctypes.CDLL, weight: Weight) -> int:
    layout = (ctypes.c_int64 * 8)()
    assert library.qcompile_cuda_layout(*_numbers(weight), layout) == 0
    return layout[1]


def _plan(library: ctypes.CDLL, weight: Weight, m: int, machine: Machine, available: int = 0, route: int = -1) -> Any:
    """A Plan, or None where there is none."""
    sizes = (ctypes.c_int64 * 4)(
        machine.multiprocessors, machine.architecture, machine.shared_bytes, machine.shared_total
    )
    values, seconds = (ctypes.c_int64 * len(NAMES))(), ctypes.c_double()
    code = library.qcompile_cuda_plan(
        *_numbers(weight), m, sizes, machine.bytes_per_second, machine.half_per_second, available, route, values,
        ctypes.byref(seconds),
    )  # fmt: skip
    return Plan(dict(zip(NAMES, values, strict=True)), seconds.value) if code == 0 else None


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    size = st.one_of(st.integers(1, 700), st.integers(1, 40000), st.sampled_from([576, 1536, 4096, 14336, 151936]))
    block_size = draw(st.sampled_from([16, 32, 48, 64, 100, 128, 256, 1 << 31]))
    return Weight(draw(size), draw(size), block_size, draw(st.sampled_from([4, 8])), draw(st.integers(0, 2)))


MACHINE = st.sampled_from(list(MACHINES.values()))
ROWS = st.one_of(st.integers(1, 300), st.integers(1, 70000), st.sampled_from([8, 16, 32, 64, MAX_ROWS, 1 << 31]))


def _check_split(weight: Weight, plan: Plan, units: int, least: int) -> None:
    """Each CTA of a sum takes as many units, and even the last one has some; scratch and counters for all."""
    each = -(-units // plan.split)
    assert (plan.split - 1) * each < units <= plan.split * each
    assert 1 <= plan.split <= 16
    assert plan.split == 1 or each >= least
    assert max(plan.grid_m, plan.split) < 1 << 16, "gridDim.y and z"
    sums = plan.split * plan.grid_m * plan.tokens * weight.padded_n * 4
    assert (plan.scratch_bytes, plan.counters) == ((sums, plan.grid_n * plan.grid_m) if plan.split > 1 else (0, 0))


def _stage_bytes(weight: Weight, tokens: int, block_n: int) -> int:
    """Codes of 256 k, rows of x with 16 bytes of padding, scales and zero points of eight groups (of 32)."""
    scales = 8 * block_n * (4 if weight.element == 2 else 2)
    return UNIT * block_n * weight.bits // 8 + tokens * (UNIT + 8) * 2 + scales + 8 * block_n * weight.bits // 8


@settings(max_examples=300, deadline=None)
@given(weight=weights(), m=ROWS, machine=MACHINE)
def test_decode_covers_everything_once(library: ctypes.CDLL, weight: Weight, m: int, machine: Machine) -> None:
    plan, padded_k = _plan(library, weight, m, machine, route=DECODE), _padded_k(library, weight)
    rows = min(m, MAX_ROWS)
    assert (plan.route, plan.chunk) == (DECODE, 0)
    assert (plan.grid_m - 1) * plan.tokens < rows <= plan.grid_m * plan.tokens
    assert (plan.grid_n - 1) * plan.block_n < weight.padded_n <= plan.grid_n * plan.block_n
    assert (plan.tokens, plan.block_n, plan.threads) in [(8, 64, 128), (16, 64, 128), (32, 128, 256), (64, 128, 256)]
    _check_split(weight, plan, -(-padded_k // UNIT), 3)
    assert 2 <= plan.stages <= 4
    assert plan.shared_bytes == plan.stages * _stage_bytes(weight, plan.tokens, plan.block_n)
    assert plan.shared_bytes <= machine.shared_bytes
    assert math.isfinite(plan.seconds)
    assert plan.seconds > weight.k * weight.n * weight.bits / 8 / machine.bytes_per_second


@settings(max_examples=200, deadline=None)
@given(weight=weights(), m=ROWS, machine=MACHINE)
def test_chunks_for_cublas(library: ctypes.CDLL, weight: Weight, m: int, machine: Machine) -> None:
    plan = _plan(library, weight, m, machine, CUBLAS, DEQUANTIZE)
    column = _padded_k(library, weight) * 2
    assert (plan.route, plan.counters) == (DEQUANTIZE, 0)
    assert plan.chunk % 64 == 0
    assert 64 <= plan.chunk <= weight.padded_n
    assert plan.chunk == 64 or plan.chunk * column <= CHUNK_BYTES
    assert plan.scratch_bytes == plan.chunk * column
    assert plan.seconds > 2 * weight.k * weight.n * min(m, MAX_ROWS) / machine.half_per_second


@settings(max_examples=100, deadline=None)
@given(weight=weights(), m=ROWS, machine=MACHINE, available=st.integers(0, 3))
def test_the_fastest_route_is_taken(library, weight: Weight, m: int, machine: Machine, available: int) -> None:
    """Of those that are there. The Hopper kernel has not run on a GPU, so it is no candidate."""
    routes = [DECODE, DEQUANTIZE] if available & CUBLAS else [DECODE]
    forced = [_plan(library, weight, m, machine, available, route) for route in routes]
    plan = _plan(library, weight, m, machine, available)
    assert plan == min(forced, key=lambda one: one.seconds)


@settings(max_examples=100, deadline=None)
@given(weight=weights(), m=ROWS)
def test_hopper_by_force(library: ctypes.CDLL, weight: Weight, m: int) -> None:
    plan, machine = _plan(library, weight, m, MACHINES["H100"], HOPPER_KERNELS, HOPPER), MACHINES["H100"]
    if weight.bits != 4 or weight.element == 2:
        assert plan is None
        assert b"route 2 needs sm_90" in library.qcompile_cuda_error()
        return
    rows = min(m, MAX_ROWS)
    assert (plan.route, plan.block_n, plan.threads) == (HOPPER, 128, 384)
    assert plan.tokens in (64, 128, 256)
    assert plan.tokens == 64 or plan.tokens < 2 * rows, "no tile that is half empty"
    assert (plan.grid_m - 1) * plan.tokens < rows <= plan.grid_m * plan.tokens
    assert (plan.grid_n - 1) * plan.block_n < weight.padded_n <= plan.grid_n * plan.block_n
    steps = _padded_k(library, weight) // 64
    _check_split(weight, plan, steps, 12)
    assert plan.split == 1 or plan.split * plan.grid_n * plan.grid_m <= machine.multiprocessors
    assert plan.shared_bytes <= machine.shared_bytes


def test_a_forced_route_must_be_there(library: ctypes.CDLL) -> None:
    weight, machine = Weight(4096, 4096), MACHINES["A100"]
    assert _plan(library, weight, 64, machine, HOPPER_KERNELS, DEQUANTIZE) is None
    assert b"needs cuBLAS, which was not found" in library.qcompile_cuda_error()
    assert _plan(library, weight, 64, machine, CUBLAS | HOPPER_KERNELS, HOPPER) is None, "no sm_90"
    assert _plan(library, weight, 64, MACHINES["H100"], CUBLAS, HOPPER) is None, "not built in"
    assert _plan(library, weight, 64, MACHINES["H100"], HOPPER_KERNELS, HOPPER) is not None


def test_few_columns_share_their_sums(library: ctypes.CDLL) -> None:
    """One row: enough CTAs to draw the memory's bandwidth, by splitting k only where the columns are too few."""
    machine = MACHINES["H100"]
    for n in (576, 1024, 2048, 4096):
        plan = _plan(library, Weight(4096, n), 1, machine)
        assert plan.split > 1, n
        assert plan.grid_n * plan.split <= 4 * machine.multiprocessors
    for n in (32768, 151936):
        assert _plan(library, Weight(4096, n), 1, machine).split == 1, n
    assert _plan(library, Weight(512, 576), 1, machine).split == 1, "k is too short to share"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_few_rows_decode_and_many_go_to_cublas(library: ctypes.CDLL, machine: Machine) -> None:
    routes = [_plan(library, Weight(4096, 14336), 1 << shift, machine, CUBLAS).route for shift in range(15)]
    assert routes == sorted(routes), "once cuBLAS is faster, it stays so"
    assert (routes[0], routes[5], routes[-1]) == (DECODE, DECODE, DEQUANTIZE)
    assert _plan(library, Weight(4096, 14336), 1 << 14, machine).route == DECODE, "without cuBLAS"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_more_rows_take_longer(library: ctypes.CDLL, machine: Machine) -> None:
    seconds = [_plan(library, Weight(4096, 4096), 1 << shift, machine, CUBLAS).seconds for shift in range(14)]
    assert seconds == sorted(seconds)


def test_machines_with_little_shared_memory(library: ctypes.CDLL) -> None:
    """Smaller tiles and fewer stages; none at all below two stages of eight rows."""
    tokens = {
        kilo: _plan(library, Weight(4096, 4096), 64, Machine(30, 80, kilo * KILO, 2 * kilo * KILO, 1e11, 1e13))
        for kilo in (227, 99, 64, 48, 16)
    }
    assert [plan and plan.tokens for plan in tokens.values()] == [64, 32, 16, 16, None]
    assert b"no kernel fits" in library.qcompile_cuda_error()


@pytest.mark.parametrize(
    ("weight", "m", "machine", "route"),
    [
        (Weight(0, 64), 1, MACHINES["H100"], -1),
        (Weight(64, 64), 0, MACHINES["H100"], -1),
        (Weight(64, 64), (1 << 31) + 1, MACHINES["H100"], -1),
        (Weight(64, 64), 1, MACHINES["H100"], 3),
        (Weight(64, 64), 1, MACHINES["H100"], -2),
        (Weight(64, 64), 1, Machine(0, 90, 1 << 17, 1 << 18, 1e12, 1e15), -1),
        (Weight(64, 64), 1, Machine(132, 90, 1 << 17, 1 << 18, math.nan, 1e15), -1),
    ],
)
def test_absurd_numbers_are_refused(library, weight: Weight, m: int, machine: Machine, route: int) -> None:
    assert _plan(library, weight, m, machine, CUBLAS, route) is None
    assert library.qcompile_cuda_error()


def test_weights_that_no_kernel_computes(library: ctypes.CDLL) -> None:
    assert _plan(library, Weight(1 << 21, 64), 1, MACHINES["H100"]) is not None
    assert _plan(library, Weight((1 << 21) + 1, 64), 1, MACHINES["H100"]) is None
    assert _plan(library, Weight(64, 1 << 31), 1, MACHINES["H100"]) is None
    assert b"too large" in library.qcompile_cuda_error()
