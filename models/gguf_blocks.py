"""Quantized tensors of a GGUF file taken apart: codes, scales, minima, as the integers and float16 numbers they are.

Layouts are those of ggml (ggml-common.h, `dequantize_row_…` of ggml-quants.c). A row of a tensor lies along K, inputs
of a product; it is cut into blocks of 32 or 256 numbers, and these into groups that share a scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]

_FOUR, _NIBBLE, _SIX, _SIGN = np.uint8(4), np.uint8(15), np.uint8(63), np.uint8(128)


@dataclass(frozen=True, eq=False)
class Blocks:
    """N rows of K numbers in S blocks and G groups a row. Number k of a row, of group g and block s, is

    (codes - middle) * scale[s] * (factors[g] - factor_middle) - minimum[s] * minimum_factors[g], or, of a table, the
    level of its code in place of the first difference.

    codes: (N, K). scale: (N, S) float16; of mxfp4 bytes e, for 2^(e - 128). factors: (N, G), None for ones. minimum:
    (N, S), None for zeros; minimum_factors: (N, G), None for ones.
    """

    codes: Bytes
    scale: Halves | Bytes
    factors: Bytes | None = None
    minimum: Halves | None = None
    minimum_factors: Bytes | None = None


@dataclass(frozen=True)
class Kind:
    """A type of GGUF: how its blocks are laid out.

    block: numbers of a block. size: its bytes. group: numbers that share a scale. bits: of a code. table: of levels, by
    name; "" where codes are integers. middle: the code that stands for 0 where there are no minima. factor_bits: of the
    integer factor of a group; 0 for none. take: blocks (count, size) as `Blocks` of one row each.
    """

    block: int
    size: int
    group: int
    bits: int
    take: Callable[[Bytes], Blocks]
    table: str = ""
    middle: int = 0
    factor_bits: int = 0
    factor_middle: int = 0


def unpack(kind: Kind, rows: Bytes) -> Blocks:
    """Rows (N, bytes) of a tensor, taken apart."""
    n = len(rows)
    own = kind.take(np.ascontiguousarray(rows).reshape(-1, kind.size))

    def by_row(array: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic] | None:
        return None if array is None else array.reshape(n, -1)

    parts = (own.codes, own.scale, own.factors, own.minimum, own.minimum_factors)
    return Blocks(*map(by_row, parts))  # type: ignore[arg-type]


def _cut(blocks: Bytes, *sizes: int) -> list[Bytes]:
    """The fields of a block, of so many bytes each, and what is left."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _half(field: Bytes) -> Halves:
    return np.ascontiguousarray(field).view("<f2").astype(np.float16)


def _parts(field: Bytes, run: int, width: int) -> Bytes:
    """Codes of `width` bits: of each run of bytes first the lowest bits of all of them, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    mask = np.uint8((1 << width) - 1)
    return ((field.reshape(len(field), -1, 1, run) >> shifts) & mask).reshape(len(field), -1)


def _bits(field: Bytes) -> Bytes:
    """The bits of little-endian words, lowest first."""
    return np.unpackbits(field, axis=1, bitorder="little")


def _six(field: Bytes) -> tuple[Bytes, Bytes]:
    """Eight factors of scales and eight of minima, 6 bits each, of Q4_K and Q5_K's 12 bytes."""
    low, minima, mixed = _cut(field, 4, 4)
    high, upper = (low >> np.uint8(2)) & np.uint8(0x30), (minima >> np.uint8(2)) & np.uint8(0x30)
    factors = np.concatenate([low & _SIX, (mixed & _NIBBLE) | high], axis=1)
    return factors, np.concatenate([minima & _SIX, (mixed >> _FOUR) | upper], axis=1)


def _q4_0(blocks: Bytes) -> Blocks:
    scale, codes = _cut(blocks, 2)
    return Blocks(_parts(codes, 16, 4), _half(scale))


def _q4_1(blocks: Bytes) -> Blocks:
    scale, minimum, codes = _cut(blocks, 2, 2)
    return Blocks(_parts(codes, 16, 4), _half(scale), minimum=-_half(minimum))


def _q5_0(blocks: Bytes) -> Blocks:
    scale, high, low = _cut(blocks, 2, 4)
    return Blocks(_parts(low, 16, 4) | _bits(high) << _FOUR, _half(scale))


def _q5_1(blocks: Bytes) -> Blocks:
    scale, minimum, high, low = _cut(blocks, 2, 2, 4)
    return Blocks(_parts(low, 16, 4) | _bits(high) << _FOUR, _half(scale), minimum=-_half(minimum))


def _q8_0(blocks: Bytes) -> Blocks:
    scale, codes = _cut(blocks, 2)
    return Blocks(codes ^ _SIGN, _half(scale))


def _q2_k(blocks: Bytes) -> Blocks:
    both, codes, scale, minimum = _cut(blocks, 16, 64, 2)
    return Blocks(_parts(codes, 32, 2), _half(scale), both & _NIBBLE, _half(minimum), both >> _FOUR)


def _q3_k(blocks: Bytes) -> Blocks:
    high, low, factors, scale = _cut(blocks, 32, 64, 12)
    nibbles, pairs = _cut(factors, 8)
    own = _parts(nibbles, 8, 4) | _parts(pairs, 4, 2) << _FOUR
    return Blocks(_parts(low, 32, 2) | _parts(high, 32, 1) << np.uint8(2), _half(scale), own)


def _q4_k(blocks: Bytes) -> Blocks:
    scale, minimum, factors, codes = _cut(blocks, 2, 2, 12)
    own, minima = _six(factors)
    return Blocks(_parts(codes, 32, 4), _half(scale), own, _half(minimum), minima)


def _q5_k(blocks: Bytes) -> Blocks:
    scale, minimum, factors, high, low = _cut(blocks, 2, 2, 12, 32)
    own, minima = _six(factors)
    return Blocks(_parts(low, 32, 4) | _parts(high, 32, 1) << _FOUR, _half(scale), own, _half(minimum), minima)


def _q6_k(blocks: Bytes) -> Blocks:
    low, high, factors, scale = _cut(blocks, 128, 64, 16)
    return Blocks(_parts(low, 64, 4) | _parts(high, 32, 2) << _FOUR, _half(scale), factors ^ _SIGN)


def _iq4_xs(blocks: Bytes) -> Blocks:
    scale, high, low, codes = _cut(blocks, 2, 2, 4)
    pairs = (_half_word(high) >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    nibbles = np.stack([low & _NIBBLE, low >> _FOUR], axis=-1).reshape(len(low), -1)
    return Blocks(_parts(codes, 16, 4), _half(scale), nibbles | pairs << _FOUR)


def _half_word(field: Bytes) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(field).view("<u2").astype(np.uint16)


def _mxfp4(blocks: Bytes) -> Blocks:
    scale, codes = _cut(blocks, 1)
    return Blocks(_parts(codes, 16, 4), scale)


# By the name that ggml has for the type. The sign of a minimum is turned in Q4_1 and Q5_1, which add it.
KINDS: Mapping[str, Kind] = {
    "Q4_0": Kind(32, 18, 32, 4, _q4_0, middle=8),
    "Q4_1": Kind(32, 20, 32, 4, _q4_1),
    "Q5_0": Kind(32, 22, 32, 5, _q5_0, middle=16),
    "Q5_1": Kind(32, 24, 32, 5, _q5_1),
    "Q8_0": Kind(32, 34, 32, 8, _q8_0, middle=128),
    "Q2_K": Kind(256, 84, 16, 2, _q2_k, factor_bits=4),
    "Q3_K": Kind(256, 110, 16, 3, _q3_k, middle=4, factor_bits=6, factor_middle=32),
    "Q4_K": Kind(256, 144, 32, 4, _q4_k, factor_bits=6),
    "Q5_K": Kind(256, 176, 32, 5, _q5_k, factor_bits=6),
    "Q6_K": Kind(256, 210, 16, 6, _q6_k, middle=32, factor_bits=8, factor_middle=128),
    "IQ4_NL": Kind(32, 18, 32, 4, _q4_0, table="iq4_nl"),
    "IQ4_XS": Kind(256, 136, 32, 4, _iq4_xs, table="iq4_nl", factor_bits=6, factor_middle=32),
    "MXFP4": Kind(32, 17, 32, 4, _mxfp4, table="mxfp4"),
}
