"""mxfp4: the 4-bit numbers of OCP's Microscaling Formats, E2M1, in blocks of 32 that share a power of two, E8M0.

An element decodes to level * 2^(e - 128), level the int8 of twice the E2M1 number, e the byte stored for its block: the
specification's E2M1 * 2^(e - 127).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, LookedUp, Quantized
from qcompile.passes.formats.base import Cache
from qcompile.passes.formats.tables import E2M1_TWICE, TableGrid, Tables
from qcompile.passes.spec import PerGroup

_BLOCK, _BIAS = 32, 128
# Exponents of the scales of levels that a file may hold, by the type of the weights: those of float32 stay normal in
# products with usual activations, those of float16 are such that level times scale is a finite float16.
_ENDS = {np.dtype(np.float32): (-119, 120), np.dtype(np.float16): (-24, 12)}

# Scales of a body, from the bytes that are stored. A Cast, since ONNX Runtime folds no CastLike.
_FACTOR = """
  byte_of = Cast <to: int = 1> ({stored})
  bias_of = Constant <value_float: float = {bias}.0> ()
  exponent = Sub (byte_of, bias_of)
  base = Constant <value_float: float = 2.0> ()
  power = Pow (base, exponent)
  factor = Cast <to: int = @dtype> (power)
"""


@dataclass(frozen=True)
class MicroGrid(TableGrid):
    """Levels of E2M1 times powers of two."""

    @property
    def shrinks(self) -> tuple[float, ...]:
        """The scales beside the specification's own, which cuts off up to a quarter of the largest number."""
        return (1.0, 2.0, 0.5)

    @property
    def looked_up(self) -> LookedUp:
        least, most = _ENDS[np.dtype(self.scale_dtype)]
        return replace(self._own_table, scales="powers", least=least, most=most)

    def storable(self, scale: Array) -> Array:
        """2^floor(log2(1.5 s)): for the span of a block the specification's 2^(floor(log2(max |w|)) - 2), halved."""
        low, high = _ENDS[np.dtype(self.scale_dtype)]
        _, exponent = np.frexp(np.float32(1.5) * scale)
        powers = np.ldexp(np.float32(1), np.clip(exponent - 1, low, high))
        return np.where(scale == 0, np.float32(1), powers).astype(np.float32)


class MXFP4(Tables):
    """OCP's microscaling float4: E2M1 numbers, a power of two for each block of 32 rows."""

    name, words, native, extra = "mxfp4", ("MXFP4",), ("MXFP4",), ("dtype",)

    def grid(self, target: str) -> MicroGrid:
        return MicroGrid(self.name, E2M1_TWICE, PerGroup(_BLOCK), scale_bits=8)

    def table(self, word: str) -> Sequence[float]:
        return E2M1_TWICE

    def scales(self, quantized: Quantized) -> npt.NDArray[Any]:
        _, exponent = np.frexp(quantized.qparams.scale)
        return np.asarray(exponent - 1 + _BIAS, np.uint8)

    def attributes(self, spec: Grid, block_size: int, k: int) -> dict[str, int]:
        """dtype: that of the output, as ONNX numbers types; the stored scales do not tell it."""
        dtype = int(ir.DataType.from_numpy(np.dtype(spec.scale_dtype)))
        return super().attributes(spec, block_size, k) | {"dtype": dtype}

    def factor(self, stored: str) -> tuple[str, str]:
        return _FACTOR.format(stored=stored, bias=_BIAS), "factor"

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        if target != "matmulnbits":
            return ""
        return f"target matmulnbits has no operator for {self.name}: choose target qcompile or qdq, or other weights"

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its bodies are inlined."""
