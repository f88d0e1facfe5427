"""Tiny graphs of QuantizeLinear and DequantizeLinear, and what ONNX Runtime makes of them."""

import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

X86 = platform.machine().lower() in ("x86_64", "amd64")
VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
STEP = 0.05  # the scale of every activation but where said otherwise
ZEROS = {np.uint8: 128, np.int8: 3, np.uint16: 32768, np.int16: 0}


class Tiny:
    """A graph under construction; every method appends and returns the name of a value."""

    def __init__(self) -> None:
        self.nodes, self.constants, self.inputs, self.outputs, self.functions = [], [], [], [], []
        self.random, self.count = np.random.default_rng(0), 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(self.name("x"), TensorProto.FLOAT, shape))
        return self.inputs[-1].name

    def constant(self, value) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), self.name("c")))
        return self.constants[-1].name

    def floats(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def op(self, operator: str, inputs: list[str], outputs: int = 1, **attributes) -> list[str]:
        names = [self.name(operator) for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def one(self, operator: str, *inputs: str, **attributes) -> str:
        return self.op(operator, list(inputs), **attributes)[0]

    def qdq(self, value: str, dtype=np.uint8, scale: float = STEP, zero: int | None = None) -> str:
        grid = [self.constant(np.float32(scale)), self.constant(dtype(ZEROS[dtype] if zero is None else zero))]
        return self.one("DequantizeLinear", self.one("QuantizeLinear", value, *grid), *grid)

    def scales(self, shape: tuple[int, ...], axis: int | None) -> np.ndarray:
        return self.random.uniform(0.004, 0.02, () if axis is None else shape[axis]).astype(np.float32)

    def weight(self, shape: tuple[int, ...], axis: int | None, dtype=np.int8, scale=None, **attributes) -> str:
        """Codes of all values but -128, zero point 0 or 128; per tensor where `axis` is None."""
        scale = self.scales(shape, axis) if scale is None else scale
        codes = self.random.integers(-127, 128, shape) + (128 if dtype is np.uint8 else 0)
        zero = np.full(scale.shape, 128 if dtype is np.uint8 else 0).astype(dtype)
        attributes |= {} if axis is None else {"axis": axis % len(shape)}
        inputs = [self.constant(codes.astype(dtype)), self.constant(scale), self.constant(zero)]
        return self.one("DequantizeLinear", *inputs, **attributes)

    def int32_bias(self, scale: np.ndarray) -> str:
        """16 codes of the scale of the products' sums."""
        codes = self.random.integers(-500, 500, 16).astype(np.int32)
        inputs = [self.constant(codes), self.constant(scale), self.constant(np.zeros(scale.shape, np.int32))]
        return self.one("DequantizeLinear", *inputs, **({"axis": 0} if scale.ndim else {}))

    def output(self, *names: str) -> "Tiny":
        self.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        return self

    def model(self) -> bytes:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.constants)
        domains = [helper.make_opsetid(*pair) for pair in (("", 21), ("com.microsoft", 1), ("qcompile", 1))]
        return helper.make_model(
            graph, opset_imports=domains, functions=self.functions, ir_version=10
        ).SerializeToString()


def _session(model: bytes, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if optimized is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def optimized(tiny: Tiny, folder: Path, *, atol: float = 1e-4) -> Counter:
    """Operators of the optimized graph, without layout changes; `atol`: allowed beside the graph as it is written."""
    model, path = tiny.model(), folder / "optimized.onnx"
    fused, plain = _session(model, path), _session(model)
    random = np.random.default_rng(1)
    feeds = {
        value.name: (1.5 * random.standard_normal([2 if isinstance(n, str) else n for n in value.shape])).astype("f")
        for value in fused.get_inputs()
    }
    for found, wanted in zip(fused.run(None, feeds), plain.run(None, feeds), strict=True):
        assert found.shape == wanted.shape
        assert np.ptp(wanted) > 0
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
    return Counter(node.op_type for node in onnx.load(path).graph.node)
