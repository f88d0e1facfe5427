"""Codes of 2 to 8 bits in bytes: as files hold them, and as one little-endian stream.

A code is cut into fields of 1, 2, 4 or 8 bits (`ALL_FIELDS`), lowest first: 7 = 4 + 2 + 1, 5 = 4 + 1, 3 = 2 + 1. Of a
field of w bits, a byte of column n holds 8 / w rows: byte row j of B = ceil(K w / 8) has row j in its lowest bits, then
rows j + B, j + 2 B, … So a field is unpacked by one shift and one mask for all of its rows, columns stay apart (they
are joined, split and looked up as they are), and nothing is lost: `to_stream` gives the bits of codes in their order.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Bits of the fields of a code, from its lowest bit on, by the bits of the code.
FIELDS: Mapping[int, Sequence[int]] = {2: (2,), 3: (2, 1), 5: (4, 1), 6: (4, 2)}
# Of codes of whole nibbles and bytes as well, which weights have ONNX's own types for, and of 7 bits, of codebooks.
ALL_FIELDS: Mapping[int, Sequence[int]] = {**FIELDS, 4: (4,), 7: (4, 2, 1), 8: (8,)}


def byte_rows(k: int, bits: int) -> list[int]:
    """Rows of bytes of each field of k codes a column."""
    return [-(-k * width // 8) for width in ALL_FIELDS[bits]]


def shifts(bits: int) -> list[list[int]]:
    """By how many bits the bytes of each field are shifted to the right to take its rows out."""
    return [list(range(0, 8, width)) for width in ALL_FIELDS[bits]]


def pack_fields(codes: npt.NDArray[np.integer], bits: int) -> Bytes:
    """Codes (K, N), 0 … 2^bits - 1, as bytes (sum of `byte_rows`, N); blank ones (`rounding.blank`) take no memory."""
    k, n = codes.shape
    sizes = byte_rows(k, bits)
    if codes.size and not any(codes.strides):
        return np.broadcast_to(np.zeros((), np.uint8), (sum(sizes), n))
    packed, low = np.zeros((sum(sizes), n), np.uint8), 0
    for width, rows, start in zip(ALL_FIELDS[bits], sizes, np.cumsum([0, *sizes]), strict=False):
        field = (codes.astype(np.uint8) >> np.uint8(low)) & np.uint8((1 << width) - 1)
        for shift in range(0, 8, width):
            part = field[shift // width * rows : (shift // width + 1) * rows]
            packed[start : start + len(part)] |= part << np.uint8(shift)
        low += width
    return packed


def unpack_fields(packed: Bytes, bits: int, k: int) -> Bytes:
    """The codes (K, N) of bytes that `pack_fields` made."""
    codes, low, start = np.zeros((k, packed.shape[1]), np.uint8), 0, 0
    for width, rows in zip(ALL_FIELDS[bits], byte_rows(k, bits), strict=True):
        mask = np.uint8((1 << width) - 1)
        parts = [(packed[start : start + rows] >> np.uint8(shift)) & mask for shift in range(0, 8, width)]
        codes |= np.concatenate(parts)[:k] << np.uint8(low)
        low, start = low + width, start + rows
    return codes


def to_stream(codes: npt.NDArray[np.integer], bits: int) -> Bytes:
    """Codes in C order as a little-endian stream of bits: code i is bits i * bits … of the stream, bit 0 the lowest of
    byte 0; zeros fill the last byte.
    """
    flat = codes.reshape(-1, 1).astype(np.uint8)
    return np.packbits((flat >> np.arange(bits, dtype=np.uint8)) & np.uint8(1), bitorder="little")


def from_stream(stream: Bytes, bits: int, shape: tuple[int, ...]) -> Bytes:
    """The codes of a stream that `to_stream` made."""
    count = int(np.prod(shape))
    flat = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    return np.asarray((flat << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)).reshape(shape)
