"""How a cache is stored in codes: the scales of GroupQueryAttention (ONNX Runtime), or of a QuantizeLinear."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.caches import HALF_ATTENTION, is_group_query
from qcompile.passes.graph import is_constant, small_array

Floats = npt.NDArray[np.float32]
# The inputs of a GroupQueryAttention: caches, by their slots the scales of their codes. Outputs: two slots before.
SCALES = {3: 12, 4: 13}
_TYPES = {"k_quant_type", "v_quant_type"}
_TABLE = 1 << 20  # elements of a constant of scales


@dataclass(frozen=True, eq=False)
class CacheCodes:
    """A cache (batch, heads, rows, width) as x = scale * code, symmetric around zero.

    scale: float32 (heads, width), or () of the whole cache. bits: 8, int8 codes.
    """

    scale: Floats
    bits: int = 8

    @property
    def most(self) -> int:
        """The largest code; its negative is the smallest one that a range is made for."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def dtype(self) -> ir.DataType:
        """The element type of the cache."""
        return ir.DataType.INT8

    @property
    def per(self) -> str:
        """What has a scale, as the operator calls it."""
        return "PER_CHANNEL" if self.scale.ndim else "PER_TENSOR"

    @property
    def tensor(self) -> Floats:
        """The operator's input: (1, heads, 1, width), or (1,)."""
        return self.scale[None, :, None] if self.scale.ndim else self.scale.reshape(1)

    @classmethod
    def spanning(cls, peaks: Floats, bits: int, *, channels: bool) -> "CacheCodes":
        """Codes for numbers up to peaks (heads, width) in magnitude: none of them is clipped.

        A channel that was (next to) nothing throughout has the largest code at the step of the loudest one: what it may
        hold some day is not lost.
        """
        own = cls(np.float32(1), bits)  # type: ignore[arg-type]
        top = peaks.max(initial=0.0) or np.float32(1)
        wide = np.maximum(peaks, top / own.most) if channels else top
        return cls(np.asarray(wide / own.most, np.float32), bits)

    def encode(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.int8]:
        """int8, of the shape of x."""
        scale = self.scale[:, None] if self.scale.ndim else self.scale
        codes = np.clip(np.rint(np.asarray(x, np.float32) / scale), -self.most - 1, self.most)
        return np.asarray(codes, np.int8)

    def decode(self, codes: npt.NDArray[np.int8]) -> Floats:
        """float32, of the shape of the codes."""
        return np.asarray(codes * (self.scale[:, None] if self.scale.ndim else self.scale), np.float32)


class HalfPrecision:
    """A cache of float16 numbers in a graph of float32 ones."""

    dtype: ClassVar[ir.DataType] = ir.DataType.FLOAT16

    def encode(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
        """float16, of the shape of x."""
        return np.asarray(x, np.float16)

    def decode(self, codes: npt.NDArray[np.float16]) -> Floats:
        """float32, of the same shape."""
        return np.asarray(codes, np.float32)


def codes_of(cache: ir.Value) -> CacheCodes | HalfPrecision | None:
    """How a cache is stored by what lengthens it, a GroupQueryAttention, or a Concat with what a QuantizeLinear gives;
    None of one that holds the graph's floats, or whose scales are computed.
    """
    return next((own for use in cache.uses() if (own := _stored(use.node, use.idx)) is not None), None)


def _stored(node: ir.Node, slot: int) -> CacheCodes | HalfPrecision | None:
    if (node.domain, node.op_type) == HALF_ATTENTION and slot in SCALES:
        return HalfPrecision()
    if is_group_query(node):
        place = SCALES.get(slot, 0)
        scale = node.inputs[place] if 0 < place < len(node.inputs) else None
        heads = node.attributes.get_int("kv_num_heads", 1)
    elif (node.domain, node.op_type) == ("", "Concat") and slot == 0 and len(node.inputs) == 2:
        past, new = node.inputs
        coded = past is not None and new is not None and past.dtype == ir.DataType.INT8
        scale, heads = _appended_scale(new.producer()) if coded and new is not None else None, 0
    else:
        return None
    array = small_array(scale, _TABLE) if is_constant(scale) else None
    if array is None:
        return None
    array = array.astype(np.float32)
    heads = heads or array.shape[1] if array.ndim == 4 else heads
    return CacheCodes(array.reshape(heads, -1) if array.size > 1 else array.reshape(()))


def _appended_scale(quantize: ir.Node | None) -> ir.Value | None:
    """The scale of int8 codes around zero, () or (1, heads, 1, width): that of the steps, or of what is divided before
    steps of 1.
    """
    if quantize is None or (quantize.op_type, quantize.domain) != ("QuantizeLinear", ""):
        return None
    new, scale, zero = (*quantize.inputs, None)[:3]
    step, offset = small_array(scale, 1), small_array(zero, 1)
    if step is None or step.ndim or (zero is not None and (offset is None or offset.any())):
        return None
    divide = new.producer() if new is not None else None
    if divide is None or (divide.op_type, divide.domain) != ("Div", "") or step != 1:
        return scale
    scales = divide.inputs[1]
    sizes = list(scales.shape or ()) if scales is not None and is_constant(scales) else [0]
    return scales if not sizes or (len(sizes) == 4 and sizes[0] == sizes[2] == 1) else scale
