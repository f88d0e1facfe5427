"""Graphs quantized by qdq or dynamic alone, observed on a few batches, and what becomes of them in ONNX Runtime."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from qdq_graphs import Tiny

from qcompile.compiler.plan import build
from qcompile.compiler.recipe import Recipe, Step
from qcompile.passes.base import Decision, Pass, Region

Q, DQ = "QuantizeLinear", "DequantizeLinear"
Feeds = Mapping[str, Any]


def session(proto: onnx.ModelProto, *, level: str = "ORT_ENABLE_EXTENDED", saved: Path | None = None) -> Any:
    """A session with the optimizations up to a level; `saved`: where the optimized graph goes."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass
class Made:
    """A quantized graph beside the float one it was made from."""

    before: onnx.ModelProto
    after: onnx.ModelProto
    made: Pass
    feeds: Sequence[Feeds]

    def optimized(self, folder: Path) -> Counter[str]:
        """Operators of the graph as ONNX Runtime optimizes it."""
        session(self.after, saved=folder / "optimized.onnx")
        return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)

    def error(self, *, level: str = "ORT_ENABLE_EXTENDED") -> float:
        """‖quantized - float‖ / ‖float‖ of all outputs over all batches."""
        pairs = [
            (np.float64(a), np.float64(b))
            for feeds in self.feeds
            for a, b in zip(
                session(self.after, level=level).run(None, feeds), session(self.before).run(None, feeds), strict=True
            )
        ]
        assert all(a.shape == b.shape for a, b in pairs)
        total = sum(float(np.sum(b**2)) for _, b in pairs)
        return float(np.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / total))

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """Its nodes of an operator."""
        return [node for node in self.after.graph.node if node.op_type == operator]

    def array(self, name: str) -> Any:
        """An initializer."""
        (found,) = (tensor for tensor in self.after.graph.initializer if tensor.name == name)
        return numpy_helper.to_array(found)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that gives a value."""
        return next((node for node in self.after.graph.node if name in node.output), None)

    def grid(self, name: str) -> tuple[float, int, np.dtype]:
        """(scale, zero point, type) of the QuantizeLinear behind a value."""
        (node,) = (node for node in self.nodes(Q) if node.input[0] == name)
        zero = self.array(node.input[2])
        return float(self.array(node.input[1])), int(zero), zero.dtype

    def decisions(self, action: str) -> list[Decision]:
        """What was done so."""
        return [d for d in self.made.decisions if d.action == action]


def quantized(tiny: Tiny | onnx.ModelProto, feeds: Sequence[Feeds] = (), name: str = "qdq", **parameters: Any) -> Made:
    """The graph behind qdq with exact extremes, or behind another pass; `recipe`: settings beside the pass."""
    settings = parameters.pop("recipe", {})
    before = tiny if isinstance(tiny, onnx.ModelProto) else onnx.load_from_string(tiny.model())
    for node in before.graph.node:
        node.name = node.name or node.output[0]
    before = onnx.shape_inference.infer_shapes(before)
    feeds = feeds or [drawn(before, seed) for seed in range(3)]
    if name == "qdq":
        parameters.setdefault("observer", "minmax")
    made = build(Recipe(passes=(Step(name, parameters),), **settings))[-1]
    model = ir.from_proto(before)
    _observe(made, model, before, feeds)
    made.call(Region.whole(model))
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=not after.functions)
    return Made(before, after, made, feeds)


def drawn(proto: onnx.ModelProto, seed: int = 0) -> Feeds:
    """Normal numbers for the inputs; symbolic dimensions are 2."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or 2 for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        draw = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 8, shape)
        feeds[value.name] = draw.astype(dtype)
    return feeds


def _observe(made: Pass, model: ir.Model, proto: onnx.ModelProto, feeds: Sequence[Feeds]) -> None:
    """Give the observers the extremes of what ONNX Runtime computes."""
    observers = {own.value: own for own in made.observed(model).values()}
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    given = {value.name for value in proto.graph.input}
    own = {value.name for value in proto.graph.output}
    more = [name for name in observers if name not in own | given]
    whole.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more)
    for value in whole.graph.output:
        value.type.CopyFrom(next((v.type for v in proto.graph.value_info if v.name == value.name), value.type))
    running = session(whole, level="ORT_DISABLE_ALL")
    names = [output.name for output in running.get_outputs()]
    seen = [dict(batch) | dict(zip(names, running.run(names, batch), strict=True)) for batch in feeds]
    for name, observer in observers.items():
        low, high = (f([f(batch[name]) for batch in seen]) for f in (np.min, np.max))
        observer.restore({"low": np.float32(low), "high": np.float32(high)})


def redundant_pairs(proto: onnx.ModelProto) -> list[str]:
    """DequantizeLinears that only QuantizeLinears of the same scale and zero point read: rounding that adds nothing."""
    outputs = {value.name for value in proto.graph.output}
    found = []
    for node in proto.graph.node:
        if node.op_type != DQ or node.output[0] in outputs:
            continue
        readers = [other for other in proto.graph.node if node.output[0] in other.input]
        if readers and all(other.op_type == Q and other.input[1:] == node.input[1:] for other in readers):
            found.append(node.name)
    return found
