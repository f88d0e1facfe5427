"""Products at the beginning of a graph that integers serve badly and that serve no other integer node.

A Conv on the CPU is computed in integers only between a Q and a DQ on both sides. Where the graph's own data goes in,
and float operators alone take what comes out (the spectrum before a magnitude), it rounds both for itself. Such
outputs can be coarse: of a spectrum a few bins are a hundred times as large as most, and quiet sounds have few steps of
a range that loud ones need. Everything behind has that error: silero-vad, 40 windows of which 6 others had told the
ranges: 16 to 18 dB at the tenth percentile, 20 to 21 with the weight of its first convolution alone in codes, for 8 %
of its time.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.grids import squared_error
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.qdq.providers import RULES
from qcompile.passes.qdq.selection import Selection, inputs_of, quantized_output, weight_position
from qcompile.passes.spec import ActivationSpec

# An output is coarse where its grid's error is more than this share of its power: 30 dB, a tenth of what int8 weights
# add. Of normal numbers a grid of 256 steps makes 40 dB.
_COARSE = 1e-3
# What may stand between the graph's input and such a product.
_BEFORE = {name for name, rule in RULES.items() if rule.output == "same"} | {"Identity", "Pad", "Cast"}


def coarse_islands(selection: Selection, observers: Mapping[ir.Value, Observer], spec: ActivationSpec) -> list[ir.Node]:
    """Convolutions of the graph's input that no other integer node touches, and whose output the grid rounds coarsely;
    none where nothing else is integer.
    """
    read = [node.inputs[i] for node, rule in selection.nodes.items() for i in inputs_of(node, rule)]
    readers = Counter(read)
    alone = [
        node
        for node in selection.nodes
        if node.op_type == "Conv"
        and weight_position(node) is not None
        and readers[node.inputs[0]] == 1
        and not readers[quantized_output(node)]
        and _begins(node.inputs[0])
    ]
    if len(alone) == len(selection.nodes):
        return []
    return [node for node in alone if _is_coarse(observers.get(quantized_output(node)), spec)]


def _is_coarse(observer: Observer | None, spec: ActivationSpec) -> bool:
    """Whether the data seen loses more than it may on its own grid; False of what an observer does not tell."""
    if not isinstance(observer, Histogram):
        return False
    distribution = next(observer.distributions(), None)
    if distribution is None:
        return False
    low, high = (np.reshape(end, (1,)) for end in observer.expected(spec))
    return bool(squared_error(distribution, low, high, spec)[0] > _COARSE * distribution.power)


def _begins(value: ir.Value | None) -> bool:
    """Whether a value is an input of the graph, or numbers of one in other places."""
    while value is not None and not value.is_graph_input():
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _BEFORE:
            return False
        value = node.inputs[0]
    return value is not None
