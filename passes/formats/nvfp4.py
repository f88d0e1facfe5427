"""nvfp4: 4-bit numbers, E2M1, in blocks of 16 whose scales are 8-bit floats, E4M3, times one scale for the tensor.

An element decodes to level * s * 2^exponent: level the int8 of eight times the E2M1 number, s the E4M3 number of its
block. The tensor's scale is a power of two, so that it only moves the range of the E4M3 numbers, and is chosen for the
largest weight. NVIDIA's is any float32, which rounds no block's scale better.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, LookedUp, Quantized
from qcompile.passes.formats.base import Cache
from qcompile.passes.formats.tables import E2M1_TWICE, TableGrid, Tables
from qcompile.passes.spec import PerGroup

_LEVELS = tuple(4 * level for level in E2M1_TWICE)
_BLOCK, _LARGEST = 16, 448.0
# The scale of the block with the largest weight is stored as a number near this, a quarter of the largest: `smooth` and
# `awq` may make weights larger yet.
_TOP = 112.0
# Ends of the exponents. Of float16, multiples of 2^-9 * 2^exponent are float16 numbers, and 48 times a scale is finite.
_ENDS = {np.dtype(np.float32): (-100, 100), np.dtype(np.float16): (-15, 1)}
_NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

# Scales of a body, from the bytes that are stored: a table of all 256 numbers, since few runtimes know the type.
_FACTOR = """
  numbers = Constant <value: tensor = float[256] {{{numbers}}}> ()
  byte_of = Cast <to: int = 6> ({stored})
  number = Gather (numbers, byte_of)
  whole = Constant <value_int: int = @exponent> ()
  exponent_of = Cast <to: int = 1> (whole)
  base = Constant <value_float: float = 2.0> ()
  tensor_scale = Pow (base, exponent_of)
  product_of = Mul (number, tensor_scale)
  factor = Cast <to: int = @dtype> (product_of)
"""


@dataclass(frozen=True)
class FloatScaledGrid(TableGrid):
    """Levels of E2M1 times E4M3 numbers times 2^exponent."""

    exponent: int = -10

    def ranged(self, largest: Callable[[], float]) -> "FloatScaledGrid":
        amax = largest()
        if not math.isfinite(amax) or amax <= 0:
            return self
        low, high = _ENDS[np.dtype(self.scale_dtype)]
        exponent = math.ceil(math.log2(amax / max(self.table) / _TOP))
        return replace(self, exponent=min(max(exponent, low), high))

    @property
    def looked_up(self) -> LookedUp:
        return replace(self._own_table, scales="e4m3", least=self.exponent)

    def storable(self, scale: Array) -> Array:
        """The nearest number that a byte stands for; of a group of zeros 2^exponent."""
        unit = np.float32(2.0**self.exponent)
        numbers = np.clip(np.abs(scale) / unit, _NUMBERS[1], _LARGEST).astype(ml_dtypes.float8_e4m3fn)
        return np.where(scale == 0, unit, numbers.astype(np.float32) * unit).astype(np.float32)


class NVFP4(Tables):
    """NVIDIA's float4: E2M1 numbers, an 8-bit float for each block of 16 rows."""

    name, words, native, apart = "nvfp4", ("NVFP4",), ("NVFP4",), ("exponent",)
    extra = ("dtype", "exponent")

    def grid(self, target: str) -> FloatScaledGrid:
        return FloatScaledGrid(self.name, _LEVELS, PerGroup(_BLOCK), scale_bits=8)

    def table(self, word: str) -> Sequence[float]:
        return _LEVELS

    def scales(self, quantized: Quantized) -> npt.NDArray[Any]:
        numbers = quantized.qparams.scale / np.float32(2.0 ** _scaled(quantized.spec).exponent)
        return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    def attributes(self, spec: Grid, block_size: int, k: int) -> dict[str, int]:
        """dtype: that of the output, as ONNX numbers types. exponent: of the tensor's scale."""
        dtype = int(ir.DataType.from_numpy(np.dtype(spec.scale_dtype)))
        return super().attributes(spec, block_size, k) | {"dtype": dtype, "exponent": _scaled(spec).exponent}

    def factor(self, stored: str) -> tuple[str, str]:
        numbers = ", ".join("0.0" if np.isnan(number) else repr(float(number)) for number in _NUMBERS)
        return _FACTOR.format(stored=stored, numbers=numbers), "factor"

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        if target != "matmulnbits":
            return ""
        return f"target matmulnbits has no operator for {self.name}: choose target qcompile or qdq, or other weights"

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its bodies are inlined."""


def _scaled(spec: Grid) -> FloatScaledGrid:
    if not isinstance(spec, FloatScaledGrid):
        raise TypeError(f"{spec} has no scale for the tensor")
    return spec
