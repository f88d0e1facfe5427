"""The targets: which operators a file holds, and what another runtime than ONNX Runtime's CPU provider asks of codes.

What those runtimes ask was read in their documents (docs/providers.md), and not run: no such device was at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

TargetName = Literal["qcompile", "matmulnbits", "qdq", "tensorrt", "qnn"]
Operators = Literal["qcompile", "qdq", "matmulnbits"]


@dataclass(frozen=True)
class Target:
    """What a target is made of.

    operators: what packed products become (formats/lower.py). runtime: the one that files are for, in words, and are
    checked for (passes/conform); "" where that is ONNX Runtime. provider: whose Q and DQ a pass writes that has such a
    parameter; "": what the pass says.
    bits: of the codes of weights. groups: block sizes that it takes, the default first; empty: all. symmetric: codes
    have no zero points and positive scales, in whole blocks, which are halved down to `least` rows for that.
    decodes: whether codes may be of other weights than products': of lookups, of recurrent layers, of many matrices.
    """

    operators: Operators
    runtime: str = ""
    provider: str = ""
    bits: tuple[int, ...] = (4, 8)
    groups: tuple[int, ...] = ()
    symmetric: bool = False
    least: int = 32
    decodes: bool = True

    @property
    def signed_scale(self) -> bool:
        """Whether scales may be negative."""
        return self.operators != "qdq" and not self.symmetric


# By `TargetName`.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "qcompile": Target("qcompile"),
        "matmulnbits": Target("matmulnbits"),
        "qdq": Target("qdq"),
        # Of weights whose activations stay in float it has INT4 alone; a scale that a lookup finds is no constant.
        "tensorrt": Target("qdq", "TensorRT", "tensorrt", bits=(4,), symmetric=True, decodes=False),
        # What its provider does not take, such as lookups, runs on the CPU provider beside it.
        "qnn": Target("matmulnbits", "the QNN provider", "qnn", groups=(64, 32), symmetric=True),
    }
)
