"""A decoder's caches: graph inputs that grow by what each run appends."""

import onnx_ir as ir

# (domain, operator) of attention over caches: ONNX Runtime's, and the kernel library's of the same inputs and outputs,
# which saved files have (`formats.attention`).
MICROSOFT_ATTENTION, ATTENTION = (("com.microsoft", "GroupQueryAttention"), ("qcompile", "GroupQueryAttention"))
# The same over float16 caches beside float32 queries, which ONNX Runtime's has not.
HALF_ATTENTION = ("qcompile", "GroupQueryAttentionF16")
# The inputs that are caches, (batch, heads, past, width).
_GROWN = {**dict.fromkeys((MICROSOFT_ATTENTION, ATTENTION, HALF_ATTENTION), (3, 4)), ("", "Attention"): (4, 5)}


def is_group_query(node: ir.Node) -> bool:
    """Whether a node is a GroupQueryAttention, ONNX Runtime's or the kernel library's."""
    return (node.domain, node.op_type) in (MICROSOFT_ATTENTION, ATTENTION, HALF_ATTENTION)


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input is of a cache's form, and an output goes on from it."""
    return len(value.shape or ()) == 4 and not value.is_initializer() and any(_appends(*use) for use in value.uses())


def has_caches(graph: ir.Graph) -> bool:
    """Whether a graph is a decoder with caches, be these of another form, (batch, past, heads, width) say."""
    return any(is_cache(own) or (len(own.shape or ()) == 4 and "past" in str(own.name)) for own in graph.inputs)


def _appends(node: ir.Node, slot: int) -> bool:
    along = node.attributes.get_int("axis", 0) in (2, -2)
    written = (node.op_type, node.domain) == ("Concat", "") and slot == 0 and along
    return slot in _GROWN.get((node.domain, node.op_type), ()) or (written and node.outputs[0].is_graph_output())
