"""iq4_nl: the 16 levels of ggml's IQ4_NL, int8 numbers that lie closer together near zero, times a scale a group.

A GGUF file's blocks of 32 are these codes; of IQ4_XS, too, with scales of two levels (`block_scales`). No recipe names
it: no level is zero, so that a row of zeros could not be stored, nor a channel left out.
"""

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.formats.base import Cache
from qcompile.passes.formats.integers import checked
from qcompile.passes.formats.tables import TableGrid, Tables
from qcompile.passes.spec import granularity

# kvalues_iq4nl of ggml-common.h.
LEVELS = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip


class IQ4NL(Tables):
    """ggml's levels of 4 bits for weights, which have no zero."""

    name, words, native = "iq4_nl", ("IQ4NL",), ("IQ4NL",)

    def grid(self, target: str, *, group: int = 32) -> TableGrid:
        """group: rows that share a scale, 0 for all."""
        return TableGrid(self.name, LEVELS, granularity(checked(group)))

    def table(self, word: str) -> Sequence[float]:
        return LEVELS

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        if target != "matmulnbits":
            return ""
        return f"target matmulnbits has no operator for {self.name}: choose target qcompile or qdq, or other weights"

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its bodies are inlined."""
