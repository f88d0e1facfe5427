"""How a cache is stored in codes: GroupQueryAttention's k_scale and v_scale (ONNX Runtime's contrib operators)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.graph import is_constant, small_array

Floats = npt.NDArray[np.float32]
DOMAIN, ATTENTION = "com.microsoft", "GroupQueryAttention"
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


def codes_of(cache: ir.Value) -> CacheCodes | None:
    """How the attention that reads a cache stores it; None of one that holds floats, or whose scales are computed."""
    for use in cache.uses():
        node, slot = use.node, SCALES.get(use.idx, 0)
        if (node.domain, node.op_type) != (DOMAIN, ATTENTION) or not 0 < slot < len(node.inputs):
            continue
        scale = small_array(node.inputs[slot], _TABLE) if is_constant(node.inputs[slot]) else None
        if scale is not None:
            heads = node.attributes.get_int("kv_num_heads", 1)
            return CacheCodes(scale.reshape(heads, -1) if scale.size > 1 else scale.reshape(()))
    return None
