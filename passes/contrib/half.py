"""Pass kv16: a decoder's caches in half precision beside single."""

from collections.abc import Set
from typing import ClassVar

import onnx_ir as ir

from qcompile.passes.base import Pass, Region
from qcompile.passes.caches import MICROSOFT_ATTENTION, is_cache
from qcompile.passes.contract import Added, Fact, Stage
from qcompile.passes.contrib.kv import Cached
from qcompile.passes.formats.attention import has_kernel, to_half
from qcompile.passes.formats.functions import register


class HalfCaches(Pass):
    """Store a float32 decoder's caches as float16: half of their memory, and of what a step reads of them.

    Case 1: a GroupQueryAttention that the kernel library computes keeps its caches in float16 and computes in float32.
    Case 2: caches that anything else lengthens, reads or gives stay as they are, with the reason.
    """

    name: ClassVar[str] = "kv16"
    stage: ClassVar[Stage] = Stage.BEHIND
    needs: ClassVar[Set[Fact]] = frozenset({Fact.CANONICAL})
    prefers: ClassVar[Set[Fact]] = frozenset({Fact.FUSED})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.CACHES})
    added: ClassVar[Added | None] = Added(
        "caches", "float16", Fact.PACKED, frozenset({"qcompile"}), alone=frozenset({"genai"})
    )

    def call(self, region: Region) -> None:
        """Make the caches float16, in place."""
        graph, told = region.model.graph, set[ir.Value | None]()
        done: set[ir.Node] = set()
        for node in [own for own in graph if (own.domain, own.op_type) == MICROSOFT_ATTENTION]:
            if node in done:
                continue
            told |= set(node.inputs)
            own = Cached.of(node)
            if (reason := _kept(own)) or isinstance(own, str):
                self.decide(node.name or "", "kept", reason)
                continue
            for one in own.nodes:  # layers that share caches
                to_half(one)
                self.decide(one.name or "", "coded", "float16 caches")
            register(region.model, node.op_type)
            done |= set(own.nodes)
        for value in graph.inputs:
            if is_cache(value) and value not in told:
                self.decide(str(value.name), "kept", "no GroupQueryAttention lengthens it")


def _kept(own: Cached | str) -> str:
    """Why caches stay, or ""."""
    if isinstance(own, str):
        return own
    if own.dtype != ir.DataType.FLOAT:
        return "its caches are no float32 numbers"
    if not all(has_kernel(node) for node in own.nodes):
        return "the library has no kernel for what it does"
    presents = (value for node in own.nodes for value in node.outputs[1:3])
    readers = [use.node.op_type for value in presents for use in value.uses() if use.node.op_type != "Shape"]
    return f"a {readers[0]} reads its caches, too" if readers else ""
