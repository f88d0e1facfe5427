"""Codes in fields of bytes: nothing is lost, blank ones take no memory, and a stream has the bits in their order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.passes.bit_fields import ALL_FIELDS, byte_rows, from_stream, pack_fields, to_stream, unpack_fields
from qcompile.passes.rounding import blank
from qcompile.passes.spec import QuantSpec, granularity


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from(sorted(ALL_FIELDS)), k=st.integers(1, 70), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_nothing_is_lost(bits: int, k: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (k, n), dtype=np.uint8)
    packed = pack_fields(codes, bits)
    assert packed.shape == (sum(byte_rows(k, bits)), n)
    assert packed.shape[0] * 8 - k * bits < 8 * len(ALL_FIELDS[bits])  # less than a byte a field is padding
    np.testing.assert_array_equal(unpack_fields(packed, bits, k), codes)
    stream = to_stream(codes, bits)
    assert stream.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(from_stream(stream, bits, codes.shape), codes)
    whole = int.from_bytes(stream.tobytes(), "little")
    assert [whole >> (i * bits) & ((1 << bits) - 1) for i in range(codes.size)] == codes.reshape(-1).tolist()


@pytest.mark.parametrize("bits", sorted(ALL_FIELDS))
def test_columns_stay_apart(bits: int) -> None:
    """What is joined and looked up by columns needs no repacking."""
    codes = np.random.default_rng(0).integers(0, 1 << bits, (37, 10), dtype=np.uint8)
    np.testing.assert_array_equal(pack_fields(codes[:, 3:5], bits), pack_fields(codes, bits)[:, 3:5])


def test_blank_codes_take_no_memory() -> None:
    spec = QuantSpec(3, granularity(64))
    packed = pack_fields(blank(np.broadcast_to(np.float32(0), (10**6, 10**6)), spec).codes, 3)
    assert packed.strides == (0, 0)
    assert packed.shape == (375_000, 10**6)
