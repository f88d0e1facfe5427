"""The kernels without ONNX Runtime: kernel_check under sanitizers, and the library's plain C functions."""

import ctypes
import platform
import re
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_builds import SANITIZED, build_kernel_check, passed, run
from native_models import NATIVE, PAIRS, TABLES, WORDS, Case, Weight, native_library

from qcompile.passes.bit_fields import FIELDS
from qcompile.passes.codebooks import CODEBOOKS

INT8_LEVELS = 127
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """kernel_check with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build_kernel_check(*SANITIZED) / "kernel_check"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(native_library()))
    loaded.qcompile_kernels.restype = ctypes.c_char_p
    loaded.qcompile_chosen_kernel.restype = loaded.qcompile_formats.restype = ctypes.c_char_p
    loaded.qcompile_weight_bytes.restype = ctypes.c_int64
    create = loaded.qcompile_weight_create
    create.restype = ctypes.c_void_p
    create.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 3, ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 2]
    create.argtypes += [ctypes.c_int, ctypes.c_void_p]
    for function in (loaded.qcompile_weight_destroy, loaded.qcompile_weight_bytes):
        function.argtypes = [ctypes.c_void_p]
    loaded.qcompile_weight_unpack.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    multiply = loaded.qcompile_weight_multiply
    multiply.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, *[ctypes.c_void_p] * 2]
    multiply.argtypes += [ctypes.c_int]
    return loaded


@pytest.fixture(scope="module")
def names(library: ctypes.CDLL) -> list[str]:
    return library.qcompile_kernels().decode().split(",")


# ---- kernel_check ----


def test_every_path_under_sanitizers(sanitized: Path) -> None:
    """The paths that this machine has: what its flags promise is there, in the order of speed."""
    kernels = passed(run(sanitized))
    assert kernels[0] == "reference"
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        wanted = {"avx2": {"avx2", "fma", "f16c"}, "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"}}
        wanted |= {"avx512vl": {"avx512vl", "avx512_vnni"}, "avx512vnni": {"avx512bw", "avx512dq", "avx512_vnni"}}
        wanted |= {"avx512vbmi": wanted["avx512vnni"] | {"avx512vbmi"}}
        assert kernels[1:] == [name for name, needed in wanted.items() if needed <= flags]


@pytest.mark.parametrize("fault", ["code", "activation", "cache", "guard"])
def test_the_check_can_fail(sanitized: Path, names: list[str], fault: str) -> None:
    """One code of a weight off by one, one activation, one number of a cache, one byte read behind a buffer."""
    command = [sanitized, "--sabotage", fault, names[-1]]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    if fault == "guard":
        assert "SEGV" in process.stderr
    else:
        assert "FAILED" in process.stdout


def test_unknown_kernels_are_named(sanitized: Path) -> None:
    process = subprocess.run([sanitized, "abacus"], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "'abacus'" in process.stderr
    assert "reference" in process.stderr


# ---- C functions ----


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Any size and sort; a group may be longer than K, and the last one shorter than the others."""
    k, n = draw(st.integers(1, 400)), draw(st.integers(1, 150))
    block_size = draw(st.one_of(st.sampled_from([16, 32, 48, 64, 100, 128, 256, k]), st.integers(1, 420)))
    table = draw(st.sampled_from(["", *TABLES]))
    if table:
        return _looked_up(table, (k, n), block_size, draw(st.integers(0, 1 << 32)), half=draw(st.booleans()))
    bits = draw(st.sampled_from([4, 8, *FIELDS]))
    signed = bits not in FIELDS and draw(st.booleans())
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    rng, groups = np.random.default_rng(draw(st.integers(0, 1 << 32))), -(-k // block_size)
    scale = rng.normal(0, 0.1, (groups, n)).astype(draw(st.sampled_from([np.float16, np.float32])))
    zero_point = rng.integers(low, high, (groups, n)) if draw(st.booleans()) else None
    return Weight(rng.integers(low, high, (k, n)), scale, zero_point, block_size, bits, signed)


def _looked_up(table: str, shape: tuple[int, int], block_size: int, seed: int, *, half: bool) -> Weight:
    """Codes of a table at random; half: scales in fp16, where they are no bytes."""
    case = Case(f"MatMul{table}", *shape, block_size, seed=seed)
    scale = case.arrays["scale"].astype(np.float16) if half and not case.byte_scales else case.arrays["scale"]
    return Weight(case.arrays["w"], scale, None, block_size, case.bits, signed=False, table=table)


class Packed:
    """A packed weight of the library, freed with the block."""

    def __init__(self, library: ctypes.CDLL, kernel: str, weight: Weight) -> None:
        self.library, self.shape = library, weight.codes.shape
        codes, scale = weight.stored(weight.codes), np.ascontiguousarray(weight.scale)
        zero_point = None if weight.zero_point is None else weight.stored(weight.zero_point)
        self.handle = library.qcompile_weight_create(
            kernel.encode(), *self.shape, weight.block_size, weight.word.encode(), weight.signed, codes.ctypes.data,
            scale.ctypes.data, scale.dtype == np.float16, None if zero_point is None else zero_point.ctypes.data,
        )  # fmt: skip
        assert self.handle

    def __enter__(self) -> "Packed":
        return self

    def __exit__(self, *_: object) -> None:
        self.library.qcompile_weight_destroy(self.handle)

    def unpack(self) -> np.ndarray:
        w = np.full(self.shape, np.nan, np.float32)
        self.library.qcompile_weight_unpack(self.handle, w.ctypes.data)
        return w

    def multiply(self, x: np.ndarray, activation_bits: int, bias: np.ndarray | None = None) -> np.ndarray:
        y = np.full((len(x), self.shape[1]), np.nan, x.dtype)
        code = self.library.qcompile_weight_multiply(
            self.handle, x.ctypes.data, x.dtype == np.float16, len(x), y.ctypes.data,
            None if bias is None else bias.ctypes.data, activation_bits,
        )  # fmt: skip
        assert code == 0
        return y


@settings(max_examples=200, deadline=None)
@given(weight=weights())
def test_packing_loses_nothing(library: ctypes.CDLL, weight: Weight) -> None:
    """Decoded from the packed codes, every element is the fp32 nearest to (code - zero point) * scale."""
    with Packed(library, "reference", weight) as packed:
        np.testing.assert_array_equal(packed.unpack(), weight.decoded().astype(np.float32))
        assert library.qcompile_weight_bytes(packed.handle) * 8 >= weight.codes.size * weight.bits


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=2, max_size=12), data=st.data())
def test_weights_keep_their_codes_while_others_come_and_go(
    library: ctypes.CDLL, sizes: list, data: st.DataObject
) -> None:
    made = [_plain(shape, seed) for seed, shape in enumerate(sizes)]
    held = [Packed(library, "reference", weight) for weight in made]
    for at in data.draw(st.permutations(range(len(made)))):
        np.testing.assert_array_equal(held[at].unpack(), made[at].decoded().astype(np.float32))
        library.qcompile_weight_destroy(held[at].handle)


def _plain(shape: tuple[int, int], seed: int) -> Weight:
    rng = np.random.default_rng(seed)
    scale = rng.normal(0, 0.1, (-(-shape[0] // 32), shape[1])).astype(np.float32)
    return Weight(rng.integers(0, 256, shape), scale, None, 32, 8, False)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads how much memory a process has from /proc")
def test_memory_goes_with_the_weights(library: ctypes.CDLL) -> None:
    """Larger than what small ones share; beside a small one that stays."""
    small, size = _plain((64, 64), 0), (4096, 20_000)
    with Packed(library, "reference", small) as stays:
        before = _resident()
        codes, scale = np.zeros(size, np.uint8), np.ones((1, size[1]), np.float32)
        grown = _resident()
        with Packed(library, "reference", Weight(codes, scale, None, 4096, 8, False)) as large:
            assert _resident() > grown + 0.9 * library.qcompile_weight_bytes(large.handle)
        del codes, scale
        assert _resident() < before + (8 << 20)
        np.testing.assert_array_equal(stays.unpack(), small.decoded().astype(np.float32))


def _resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _relative(y: np.ndarray, expected: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """Error beside what |y| is for independent x and w: a single element of y may be close to zero by chance."""
    usual = np.linalg.norm(x) * np.linalg.norm(w) / np.sqrt(len(w))
    return float(np.linalg.norm(y - expected) / max(usual, np.linalg.norm(expected)))


def _seen(x: np.ndarray, weight: Weight) -> np.ndarray:
    """x in int8 by row and group of 128 rows at most, for group sizes that cut into equal parts."""
    seen = x.astype(np.float64)
    for begin in range(0, x.shape[1], weight.block_size):
        part = seen[:, begin : begin + weight.block_size]
        step = np.abs(part).max(axis=1, keepdims=True) / INT8_LEVELS
        part[:] = np.rint(part / step) * step
    return seen


@settings(max_examples=100, deadline=None)
@given(weight=weights(), m=st.integers(0, 9), half=st.booleans(), biased=st.booleans(), seed=st.integers(0, 1 << 32))
def test_near_exact_products(library, names, weight: Weight, m: int, half: bool, biased: bool, seed: int) -> None:
    """16-bit activations, each path of this machine; fp16 results may be rounded once."""
    rng, dtype = np.random.default_rng(seed), np.float16 if half else np.float32
    x = rng.normal(size=(m, len(weight.codes))).astype(dtype)
    bias = rng.normal(size=weight.codes.shape[1]).astype(dtype) if biased else None
    w = weight.decoded()
    expected = x.astype(np.float64) @ w + (0 if bias is None else bias.astype(np.float64))
    for name in names:
        with Packed(library, name, weight) as packed:
            y = packed.multiply(x, 16, bias)
        assert y.shape == expected.shape
        if m:
            assert _relative(y, expected, x.astype(np.float64), w) < (6e-4 if half else 1e-4)


def test_the_rows_of_both_languages_are_the_same(library, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the passes take for native is what every instruction set has a kernel for; order does not count."""
    for name in names:
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        assert sorted(library.qcompile_formats().decode().split(",")) == sorted(WORDS)
    assert len(set(NATIVE)) == 2 * len(WORDS)


def test_both_languages_have_the_same_codebooks() -> None:
    text = (ROOT / "runtime" / "kernels" / "codebooks.h").read_text()
    stored = np.array([[int(n) for n in pair] for pair in re.findall(r"\{(-?\d+), (-?\d+)\}", text)])
    np.testing.assert_array_equal(stored, np.concatenate([CODEBOOKS[bits].pairs for bits in sorted(CODEBOOKS)]))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("half", [False, True])
def test_every_level_is_the_body_s(library, names, table: str, half: bool) -> None:
    """All 16 codes; of scales, where they are bytes, all that give finite numbers, subnormal ones too."""
    weight = _looked_up(table, (16, 252), 16, 1, half=half)
    codes = np.repeat(np.arange(16, dtype=np.uint8)[:, None], 252, 1)
    scale = np.arange(252, dtype=np.uint8)[None] if weight.scale.dtype == np.uint8 else weight.scale
    whole = replace(weight, codes=codes, scale=scale)
    for name in names:
        with Packed(library, name, whole) as packed:
            np.testing.assert_array_equal(packed.unpack(), whole.decoded().astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8, *FIELDS])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("m", [1, 7, 13])
def test_int8_products_are_those_of_the_rounded_activations(library, names, bits: int, block_size: int, m: int) -> None:
    rng = np.random.default_rng(bits + block_size)
    codes, scale = rng.integers(0, 1 << bits, (300, 70)), rng.normal(0, 0.1, (-(-300 // block_size), 70))
    weight = Weight(codes, scale.astype(np.float32), rng.integers(0, 1 << bits, scale.shape), block_size, bits, False)
    x, w = rng.normal(size=(m, 300)).astype(np.float32), weight.decoded()
    seen = _seen(x, weight)
    for name in names:
        with Packed(library, name, weight) as packed:
            assert _relative(packed.multiply(x, 8), seen @ w, seen, w) < 1e-5


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("m", [7, 45])
def test_int8_products_of_looked_up_codes(library, names, table: str, block_size: int, m: int) -> None:
    """Few rows, and tiles of many (32 and 13), whose groups are decoded once."""
    weight = _looked_up(table, (300, 70), block_size, 2, half=False)
    x, w = np.random.default_rng(3).normal(size=(m, 300)).astype(np.float32), weight.decoded()
    seen = _seen(x, weight)
    for name in names:
        with Packed(library, name, weight) as packed:
            assert _relative(packed.multiply(x, 8), seen @ w, seen, w) < 1e-5


def _pairs(library: ctypes.CDLL, name: str, case: Case, block_size: int) -> int | None:
    """The handle of a weight whose codes stand for two rows each."""
    scale = np.repeat(case.arrays["scale"], -(-case.k // block_size), axis=0)
    given = (name.encode(), case.k, case.n, block_size, case.word.encode(), 0, case.arrays["w"].ctypes.data)
    return library.qcompile_weight_create(*given, scale.ctypes.data, scale.dtype == np.float16, None)


@pytest.mark.parametrize("word", PAIRS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 3), (33, 65), (129, 64), (300, 70), (577, 130)])
def test_products_of_pairs(library, names, word: str, k: int, n: int) -> None:
    """Odd sizes, partial groups and units; one row, few, and more than a tile; blocks of rows that share a scale."""
    case = Case(f"MatMul{word}", k, n, seed=k, x_shape=("rows", k))
    w = case.weight()
    for name in names:
        for block in (k, 2 * (k // 4) or k):
            handle = _pairs(library, name, case, block)
            assert handle
            decoded = np.full((k, n), np.nan, np.float32)
            library.qcompile_weight_unpack(handle, decoded.ctypes.data)
            np.testing.assert_array_equal(decoded, w.astype(np.float32))
            for m in (1, 3, 5, 37):
                x, y = case.x(m), np.full((m, n), np.nan, np.float32)
                assert library.qcompile_weight_multiply(handle, x.ctypes.data, 0, m, y.ctypes.data, None, 16) == 0
                assert _relative(y, x.astype(np.float64) @ w, x, w) < (1e-4 if n > 3 else 1e-3)
            library.qcompile_weight_destroy(handle)


@pytest.mark.parametrize("word", PAIRS)
def test_pairs_lie_packed_where_they_are_looked_up_in_registers(library, names, word: str) -> None:
    """512 rows of 64 columns take their codes and four times their scales; a set that is slower at that has int8."""
    case = Case(f"MatMul{word}", 512, 64, x_shape=("rows", 512))
    packed, int8 = (512 * 64 * bits // 8 + 4 * 64 * 4 for bits in (case.bits / 2, 8))
    for name in names:
        handle = _pairs(library, name, case, case.k)
        size = library.qcompile_weight_bytes(handle)
        library.qcompile_weight_destroy(handle)
        assert size in (packed, int8)
        assert size == packed or name not in ("reference", "avx512vbmi")
        assert size == packed or case.bits > 5


def test_a_pair_in_two_blocks_is_refused(library: ctypes.CDLL, names: list[str]) -> None:
    case = Case("MatMulPairs64", 70, 5, x_shape=("rows", 70))
    assert _pairs(library, names[0], case, 33) is None
    assert _pairs(library, names[0], case, 34)


_CODES, _SCALE = np.zeros(256, np.uint8), np.ones(16, np.float32)
# Of a weight (64, 8) that is right; tests spoil one of them.
_ARGUMENTS = (b"reference", 64, 8, 32, b"Int4", 1, _CODES.ctypes.data, _SCALE.ctypes.data, 0, None)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, b"abacus"), (0, b""), (4, b"Int5"), (4, b"")]
    + [(position, size) for position in (1, 2, 3) for size in (0, -1, (1 << 31) + 1, (1 << 63) - 1)],
)
def test_absurd_weights_are_refused(library: ctypes.CDLL, position: int, value: object) -> None:
    arguments = list(_ARGUMENTS)
    arguments[position] = value
    assert library.qcompile_weight_create(*arguments) is None


@pytest.mark.parametrize("table", TABLES)
def test_codes_of_a_table_have_no_sign_and_no_zero_points(library: ctypes.CDLL, table: str) -> None:
    for signed, zero_point in ((1, None), (0, _CODES.ctypes.data)):
        arguments = (*_ARGUMENTS[:4], table.encode(), signed, *_ARGUMENTS[6:9], zero_point)
        assert library.qcompile_weight_create(*arguments) is None


@pytest.mark.parametrize(("m", "bits"), [(1, 4), (1, 0), (1, 32), (-1, 8)])
def test_absurd_products_are_refused(library: ctypes.CDLL, m: int, bits: int) -> None:
    handle = library.qcompile_weight_create(*_ARGUMENTS)
    x, y = np.ones((1, 64), np.float32), np.full((1, 8), 7, np.float32)
    assert library.qcompile_weight_multiply(handle, x.ctypes.data, 0, m, y.ctypes.data, None, bits) == 1
    np.testing.assert_array_equal(y, 7)
    library.qcompile_weight_destroy(handle)


def test_a_variable_names_the_path(library, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_KERNEL", raising=False)
    assert library.qcompile_chosen_kernel().decode() == names[-1]
    for name in names:
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        assert library.qcompile_chosen_kernel().decode() == name
    monkeypatch.setenv("QCOMPILE_KERNEL", "abacus")
    assert library.qcompile_chosen_kernel() == b""
