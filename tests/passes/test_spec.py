"""passes/spec.py: grids, group counts and stored sizes."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.errors import UserError
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec, granularity


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype", "qmin", "qmax"),
    [
        (4, True, ir.DataType.INT4, -8, 7),
        (4, False, ir.DataType.UINT4, 0, 15),
        (8, True, ir.DataType.INT8, -128, 127),
        (8, False, ir.DataType.UINT8, 0, 255),
    ],
)
def test_grids_are_the_whole_range_of_their_type(bits, symmetric, dtype, qmin, qmax) -> None:
    spec = QuantSpec(bits, PerGroup(32), symmetric)
    assert (spec.dtype, spec.qmin, spec.qmax) == (dtype, qmin, qmax)
    assert spec.dtype.bitwidth == bits
    codes = np.array([qmin, qmax])
    assert np.array_equal(codes.astype(spec.code_dtype), codes), "the numpy type holds every code"


@pytest.mark.parametrize(
    ("k", "group_size", "groups"), [(576, 128, 5), (576, 64, 9), (5, 4, 2), (4, 4, 1), (3, 4, 1), (1, 1, 1), (0, 4, 0)]
)
def test_partial_groups_count(k, group_size, groups) -> None:
    assert QuantSpec(4, PerGroup(group_size)).groups(k) == groups


def test_per_column_is_one_group_of_all_rows() -> None:
    assert granularity(0) == PerChannel(axis=1)
    assert granularity(32) == PerGroup(32)
    spec = QuantSpec(8, granularity(0))
    assert (spec.group_size(7), spec.groups(7)) == (7, 1)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16])
def test_other_bit_widths_are_refused(bits) -> None:
    with pytest.raises(UserError, match=f"to 2, 3, 4, 5, 6, 8 bits, got {bits}"):
        QuantSpec(bits, PerGroup(32))


@pytest.mark.parametrize(("bits", "plain"), [(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (8, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_dequantizelinear_alone_takes_4_or_8_bits(bits: int, plain: int, symmetric: bool) -> None:
    """And 8 bits that stand in for fewer have zero points, as int8 has."""
    spec = QuantSpec(bits, PerGroup(32), symmetric=symmetric).plain
    assert spec == QuantSpec(plain, PerGroup(32), symmetric=symmetric and bits not in (5, 6))


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_group_sizes_are_refused(size) -> None:
    with pytest.raises(UserError, match=f"at least 1, got {size}"):
        PerGroup(size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_per_weight_counts_what_is_stored(bits, symmetric) -> None:
    k, n = 576, 8
    spec = QuantSpec(bits, PerGroup(128), symmetric)
    w = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
    qparams = spec.fit(w)
    stored_bits = bits * spec.project(w, qparams).size + 32 * qparams.scale.size
    stored_bits += 0 if symmetric else bits * qparams.zero_point.size
    assert spec.bits_per_weight(k) == pytest.approx(stored_bits / w.size, rel=1e-12)


def test_names_say_width_group_and_symmetry() -> None:
    assert str(QuantSpec(4, PerGroup(64), symmetric=True)) == "int4 g64 sym"
    assert str(QuantSpec(8, PerChannel(1))) == "int8 per-column asym"


def test_equal_specs_are_one_key() -> None:
    assert len({QuantSpec(4, PerGroup(64)), QuantSpec(4, PerGroup(64)), QuantSpec(4, PerGroup(32))}) == 2
