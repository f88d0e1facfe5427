"""The packed weight of the CUDA kernels, made on the host: against numpy, through the library's C functions."""

import ctypes
import math
from typing import Any

import ml_dtypes
import native_models
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_models import native_library

ELEMENTS = (np.float16, ml_dtypes.bfloat16, np.float32)  # what x and the scales are, as the C functions number them
BLOCK, STEP = 64, 64  # columns and rows that lie together
NAMES = ("group", "padded_k", "padded_n", "groups", "codes_bytes", "scales_bytes", "zeros_bytes", "takes_x_as_it_is")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(native_library()))
    numbers = [*[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int]  # k, n, block_size, bits, element
    loaded.qcompile_cuda_error.restype = ctypes.c_char_p
    loaded.qcompile_cuda_layout.argtypes = [*numbers, ctypes.c_void_p]
    loaded.qcompile_cuda_pack.argtypes = [*numbers, ctypes.c_int, *[ctypes.c_void_p] * 6]
    loaded.qcompile_cuda_unpack.argtypes = [*numbers, *[ctypes.c_void_p] * 4]
    return loaded


class Weight(native_models.Weight):
    """As the CUDA side sees it."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """k, n, block_size, bits, element."""
        element = [np.dtype(one) for one in ELEMENTS].index(self.scale.dtype)
        return (*self.codes.shape, self.block_size, self.bits, element)

    @property
    def middle(self) -> int:
        """What is added to signed codes where they are stored."""
        return 1 << (self.bits - 1) if self.signed else 0

    def decoded(self) -> np.ndarray:
        """(K, N) float32: (code - zero point) * scale, rounded once."""
        return super().decoded().astype(np.float32)


def _weight(k: int, n: int, block_size: int, bits: int, element: int, signed: bool, zero: bool, seed: int) -> Weight:
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    rng, groups = np.random.default_rng(seed), -(-k // block_size)
    scale = rng.normal(0, 0.1, (groups, n)).astype(ELEMENTS[element])
    zero_point = rng.integers(low, high, (groups, n)) if zero else None
    return Weight(rng.integers(low, high, (k, n)), scale, zero_point, block_size, bits, signed)


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Any size and sort; a group may be longer than K, and the last one shorter than the others."""
    k, n = draw(st.integers(1, 400)), draw(st.integers(1, 150))
    block_size = draw(st.one_of(st.sampled_from([16, 32, 48, 64, 100, 128, 192, 256, k]), st.integers(1, 420)))
    bits, element = draw(st.sampled_from([4, 8])), draw(st.integers(0, 2))
    return _weight(
        k, n, block_size, bits, element, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 1 << 32))
    )


def _layout(library: ctypes.CDLL, numbers: tuple[int, ...]) -> dict[str, int]:
    values = (ctypes.c_int64 * len(NAMES))()
    assert library.qcompile_cuda_layout(*numbers, values) == 0
    return dict(zip(NAMES, values, strict=True))


def _pack(library: ctypes.CDLL, weight: Weight) -> tuple[np.ndarray, ...]:
    """Bytes of codes, scales and zero points, each with a byte behind it that must stay as it is."""
    layout = _layout(library, weight.numbers)
    parts = [np.full(layout[f"{name}_bytes"] + 1, 0xA5, np.uint8) for name in ("codes", "scales", "zeros")]
    codes, scale = weight.stored(weight.codes), np.ascontiguousarray(weight.scale)
    zero_point = None if weight.zero_point is None else weight.stored(weight.zero_point)
    code = library.qcompile_cuda_pack(
        *weight.numbers, weight.signed, codes.ctypes.data, scale.ctypes.data,
        None if zero_point is None else zero_point.ctypes.data, *(part.ctypes.data for part in parts),
    )  # fmt: skip
    assert code == 0
    assert [part[-1] for part in parts] == [0xA5] * 3
    return tuple(part[:-1] for part in parts)


@settings(max_examples=150, deadline=None)
@given(weight=weights())
def test_packing_loses_nothing(library: ctypes.CDLL, weight: Weight) -> None:
    w = np.full(weight.codes.shape, np.nan, np.float32)
    parts = _pack(library, weight)
    assert library.qcompile_cuda_unpack(*weight.numbers, *(part.ctypes.data for part in parts), w.ctypes.data) == 0
    np.testing.assert_array_equal(w, weight.decoded())


# ---- The same bytes by numpy, from the description in runtime/kernels/cuda/layout.h


def _padded(weight: Weight, layout: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes (padded K, padded N), scale and zero point (groups, padded N), filled up as pack.h says."""
    (k, n), groups, group = weight.codes.shape, layout["groups"], layout["group"]
    zeros = np.full((groups, layout["padded_n"]), weight.middle, np.uint8)
    if weight.zero_point is not None:
        zeros[: len(weight.scale), :n] = weight.zero_point + weight.middle
    scales = np.zeros(zeros.shape, weight.scale.dtype)
    scales[: len(weight.scale), :n] = weight.scale
    codes = np.repeat(zeros, group, axis=0)[: layout["padded_k"]].copy()
    for index, begin in enumerate(range(0, k, weight.block_size)):
        rows = weight.codes[begin : begin + weight.block_size]
        codes[index * group : index * group + len(rows), :n] = rows + weight.middle
    return codes, scales, zeros


def _by_numpy(weight: Weight, layout: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Row k = 64 step + 16 part + 8 h + 2 t + i and column n = 64 block + 16 tile + 8 r + g of the weight are element
    (h, r, i) of lane 4 g + t."""
    codes, scales, zeros = _padded(weight, layout)
    steps, blocks, groups = layout["padded_k"] // STEP, layout["padded_n"] // BLOCK, layout["groups"]
    apart = codes.reshape(steps, 4, 2, 4, 2, blocks, 4, 2, 8)  # step part h t i block tile r g
    lanes = apart.transpose(5, 0, 6, 8, 3, 1, 4, 2, 7)  # block step tile g t part | i h r
    scale = scales.reshape(groups, blocks, 4, 2, 8).transpose(1, 0, 4, 2, 3)  # block group g tile r
    zero = zeros.reshape(groups, blocks, 2, 2, 2, 8).transpose(
        1, 0, 5, 3, 2, 4
    )  # tile = 2 a + b: block group g | b a r
    if weight.bits == 8:
        lanes = lanes.transpose(0, 1, 2, 3, 4, 5, 7, 8, 6)  # h r i
        zero = zero.transpose(0, 1, 2, 4, 3, 5)  # a b r: tile r
    else:
        lanes, zero = (both[..., 0] | both[..., 1] << 4 for both in (lanes, zero))  # r is the high nibble
    return tuple(np.ascontiguousarray(part).view(np.uint8).ravel() for part in (lanes, scale, zero))


@settings(max_examples=60, deadline=None)
@given(weight=weights())
@example(_weight(96, 70, 32, 4, 0, True, True, 1))  # a group that the file lacks
@example(_weight(100, 65, 16, 8, 2, False, True, 2))  # groups filled up to 32 rows
@example(_weight(300, 64, 100, 4, 1, False, False, 3))  # to 128 rows; zero points of 0
def test_bytes_as_the_layout_says(library: ctypes.CDLL, weight: Weight) -> None:
    for part, expected in zip(_pack(library, weight), _by_numpy(weight, _layout(library, weight.numbers)), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_golden_words(library: ctypes.CDLL) -> None:
    """Lane 5 (g 1, t 1) of tile 2 has columns 33 and 41; its second word rows 18, 19, 26 and 27."""
    codes, scale = np.zeros((64, 64), np.int64), np.ones((1, 64), np.float16)
    for value, (k, n) in enumerate(
        [(18, 33), (18, 41), (26, 33), (26, 41), (19, 33), (19, 41), (27, 33), (27, 41)], start=1
    ):
        codes[k, n] = value
    packed, scales, zeros = _pack(library, Weight(codes, scale, np.arange(64)[None] % 16, 64, 4, False))
    word = ((2 * 32) + 5) * 4 + 1
    assert packed.view(np.uint32)[word] == 0x87654321
    assert np.flatnonzero(packed.view(np.uint32)).tolist() == [word]
    assert (scales.view(np.float16) == 1).all()
    assert zeros.view(np.uint32)[1] == 0x91919191, "row 1 of each tile has zero point 1, row 9 has 9"


# ---- Layouts


@settings(max_examples=200, deadline=None)
@given(k=st.integers(1, 5000), n=st.integers(1, 5000), block_size=st.integers(1, 6000), bits=st.sampled_from([4, 8]))
def test_layout(library: ctypes.CDLL, k: int, n: int, block_size: int, bits: int) -> None:
    layout = _layout(library, (k, n, block_size, bits, 0))
    group, rows = layout["group"], min(block_size, k)
    assert group == 32 or group % STEP == 0
    assert rows <= group <= max(64, 32 * rows)
    assert (layout["padded_k"] % STEP, layout["padded_n"] % BLOCK) == (0, 0)
    assert layout["padded_k"] >= k
    assert n <= layout["padded_n"] < n + BLOCK
    assert layout["groups"] == math.ceil(layout["padded_k"] / group) >= math.ceil(k / block_size)
    assert layout["codes_bytes"] == layout["padded_k"] * layout["padded_n"] * bits // 8
    assert layout["scales_bytes"] == layout["groups"] * layout["padded_n"] * 2
    assert layout["zeros_bytes"] == layout["groups"] * layout["padded_n"] * bits // 8
    assert layout["takes_x_as_it_is"] == (layout["padded_k"] == k and (group == rows or rows == k))


@pytest.mark.parametrize(
    "numbers",
    [(0, 1, 1, 4, 0), (1, 0, 1, 4, 0), (1, 1, 0, 4, 0), (1, 1, 1, 5, 0), (1, 1, 1, 4, 3), (1, 1, 1, 4, -1),
     (-5, 1, 1, 4, 0), ((1 << 31) + 1, 1, 1, 4, 0), (1, 1, 1 << 40, 8, 0), (1 << 31, 1 << 31, 32, 8, 0)],
)  # fmt: skip
def test_absurd_numbers_are_refused(library: ctypes.CDLL, numbers: tuple[int, ...]) -> None:
    some: Any = (ctypes.c_int64 * 64)()
    assert library.qcompile_cuda_layout(*numbers, some) == 1
    assert library.qcompile_cuda_pack(*numbers, 0, some, some, None, some, some, some) == 1
    assert library.qcompile_cuda_unpack(*numbers, some, some, some, some) == 1
    assert b"must be" in library.qcompile_cuda_error()


def test_null_pointers_are_refused(library: ctypes.CDLL) -> None:
    some: Any = (ctypes.c_int64 * 1024)()
    numbers = (64, 64, 64, 4, 0)
    assert library.qcompile_cuda_layout(*numbers, None) == 1
    for missing in (0, 1, 3, 4, 5):  # the zero point may be absent
        pointers = [None if index == missing else some for index in range(6)]
        assert library.qcompile_cuda_pack(*numbers, 0, *pointers) == 1
    for missing in range(4):
        assert library.qcompile_cuda_unpack(*numbers, *(None if i == missing else some for i in range(4))) == 1
    assert b"null" in library.qcompile_cuda_error()
