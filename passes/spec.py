"""How a tensor is quantized: element type, granularity, symmetry."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Codes, Grid, IntegerRange, QParams
from qcompile.passes.bit_fields import FIELDS, byte_rows
from qcompile.passes.errors import UserError
from qcompile.passes.native import LoopedGrid


@dataclass(frozen=True)
class PerChannel:
    """One scale for every index along `axis`."""

    axis: int

    def size(self, k: int) -> int:
        """Rows of a (k, N) weight that share a scale."""
        return k

    def __str__(self) -> str:
        return "per-column"


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `group_size` values along axis 0 of a (K, N) weight; the last group may be partial."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UserError(f"a group size must be at least 1, got {self.group_size}")

    def size(self, k: int) -> int:
        """Rows of a (k, N) weight that share a scale."""
        return self.group_size

    def __str__(self) -> str:
        return f"g{self.group_size}"


Granularity = PerChannel | PerGroup


def granularity(group: int) -> Granularity:
    """So many rows share a scale; 0: all of a column."""
    return PerGroup(group) if group else PerChannel(axis=1)


_DTYPES = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}
_BITS = sorted({4, 8, *FIELDS})


@dataclass(frozen=True)
class QuantSpec(LoopedGrid):
    """An integer grid for a (K, N) weight.

    `symmetric` grids are signed and have no zero point; asymmetric ones are unsigned with an integer zero point.
    `signed_scale` lets a symmetric scale be negative, so that the value of largest magnitude always meets the longer
    end of the grid (-8 at 4 bits); runtimes that demand positive scales turn it off.
    `scale_dtype` is what the file stores (the element type of the activations).
    """

    bits: int
    granularity: Granularity
    symmetric: bool = False
    signed_scale: bool = True
    scale_dtype: npt.DTypeLike = np.float32

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise UserError(f"weights are quantized to {', '.join(map(str, _BITS))} bits, got {self.bits}")

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX element type of codes of 4 and 8 bits; others are stored in fields (`bit_fields`)."""
        return _DTYPES[self.bits, self.symmetric]

    @property
    def code_dtype(self) -> type[np.int8] | type[np.uint8]:
        """The numpy type of unpacked codes, whatever the bit width."""
        return np.int8 if self.symmetric else np.uint8

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + (1 << self.bits) - 1

    @property
    def format(self) -> str:
        return f"int{self.bits}"

    def typed(self, scale_dtype: npt.DTypeLike) -> "QuantSpec":
        return replace(self, scale_dtype=scale_dtype)

    def eight(self) -> "QuantSpec":
        return replace(self, bits=8, symmetric=False)

    @property
    def plain(self) -> "QuantSpec":
        """4 bits for fewer, else 8."""
        return self if self.bits in (4, 8) else replace(self, bits=4) if self.bits < 4 else self.eight()

    @property
    def positive(self) -> bool:
        return not self.signed_scale or not self.symmetric

    @property
    def affine(self) -> IntegerRange:
        return self

    def span(self, blocks: Array, shrink: np.float32) -> QParams:
        """Zero included: asymmetric min..max, symmetric signed amax / 8 at 4 bits."""
        low = np.minimum(blocks.min(axis=1), 0) * shrink
        high = np.maximum(blocks.max(axis=1), 0) * shrink
        if not self.symmetric:
            scale = self.storable((high - low) / np.float32(self.qmax))
            return QParams(scale, np.clip(np.rint(-low / scale), self.qmin, self.qmax))
        if self.signed_scale:
            scale = np.where(high > -low, high, low) / np.float32(self.qmin)
        else:
            scale = np.maximum(high / np.float32(self.qmax), low / np.float32(self.qmin))
        scale = self.storable(scale)
        return QParams(scale, np.zeros_like(scale))

    def nearest(self, blocks: Array, qparams: QParams) -> Array:
        codes = blocks / qparams.scale[:, None]
        np.rint(codes, out=codes)
        codes += qparams.zero_point[:, None]
        return np.clip(codes, self.qmin, self.qmax, out=codes)

    def levels(self, codes: Array | Codes, zero_point: Array) -> Array:
        return np.asarray(codes, np.float32) - zero_point

    def group_size(self, k: int) -> int:
        return self.granularity.size(k)

    def bits_per_weight(self, k: int) -> float:
        scales = 8 * np.dtype(self.scale_dtype).itemsize * self.groups(k)
        zero_points = 0 if self.symmetric else self._column_bits(self.groups(k))
        return (self._column_bits(k) + scales + zero_points) / max(k, 1)

    def _column_bits(self, rows: int) -> int:
        """Bits of so many codes of a column as they are stored."""
        return 8 * sum(byte_rows(rows, self.bits)) if self.bits in FIELDS else rows * self.bits

    def __str__(self) -> str:
        return f"{self.format} {self.granularity} {'sym' if self.symmetric else 'asym'}"


def integers(spec: Grid) -> QuantSpec:
    """The grid of integers that takes a grid's place where a DequantizeLinear alone stands before the reader."""
    own = spec.plain
    if not isinstance(own, QuantSpec):
        raise TypeError(f"{own} is no grid of integers")
    return own


# Smallest and largest code of the element types that activations are quantized to. Float8 spans its finite numbers.
_ACTIVATION_GRIDS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.FLOAT8E4M3FN: (-448, 448),
}


@dataclass(frozen=True)
class ActivationSpec:
    """The grid of an activation, one scale for the tensor: real value = (code - zero_point) * scale.

    symmetric: the zero point is the middle of the grid (0 of a signed type); float8 has no other form.
    """

    dtype: ir.DataType = ir.DataType.UINT8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _ACTIVATION_GRIDS:
            known = ", ".join(dtype.name.lower() for dtype in _ACTIVATION_GRIDS)
            raise UserError(f"activations are quantized to {known}, got {self.dtype.name.lower()}")
        if self.is_float and not self.symmetric:
            raise UserError("float8 activations are symmetric: they have no zero point")

    @property
    def is_float(self) -> bool:
        """Whether codes are float8 numbers: evenly spaced in their exponent, not on a line."""
        return self.dtype == ir.DataType.FLOAT8E4M3FN

    @property
    def qmin(self) -> int:
        """The smallest code; a symmetric signed grid leaves its lowest one out."""
        low = _ACTIVATION_GRIDS[self.dtype][0]
        return low + 1 if self.symmetric and not self.is_float else low

    @property
    def qmax(self) -> int:
        """The largest code."""
        return _ACTIVATION_GRIDS[self.dtype][1]

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return (self.qmin + self.qmax) // 2

    def __str__(self) -> str:
        return f"{self.dtype.name.lower()} {'sym' if self.symmetric else 'asym'}"
