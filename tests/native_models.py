"""What the tests of the native library share: the library, and models of one operator with their float64 results."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.passes.errors import UserError
from qcompile.passes.formats import functions
from qcompile.passes.formats.emit import pack_nibbles
from qcompile.runtime.library import library_path

CODES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
}


def native_library() -> Path:
    """The library under test. Its absence is a failure wherever it could have been built."""
    try:
        return library_path()
    except UserError as error:
        if shutil.which("c++") or shutil.which("g++"):
            pytest.fail(f"there is a C++ compiler, but: {error}")
        pytest.skip("no C++ compiler, so no native library")


@dataclass
class Case:
    """One node of domain qcompile on random numbers. Initializers may be changed before proto() is called."""

    op: str = "MatMulInt4"
    k: int = 70
    n: int = 13
    block_size: int = 32
    half: bool = False
    signed: bool = False
    zero_point: bool = True
    constant: bool = True  # False: every initializer is an input too, which a caller may override
    body: bool = False
    version: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)  # besides block_size
    x_shape: Any = ("a", "b", 70)  # None: of unknown rank
    seed: int = 0

    def __post_init__(self) -> None:
        rng, groups = np.random.default_rng(self.seed), -(-self.k // self.block_size)
        self.bits = int(self.op[-1])
        self.dtype = np.float16 if self.half else np.float32
        low, high = (-(1 << (self.bits - 1)), 1 << (self.bits - 1)) if self.signed else (0, 1 << self.bits)
        codes = np.int8 if self.signed else np.uint8
        self.arrays = {
            "w": rng.integers(low, high, (self.k, self.n)).astype(codes),
            "scale": (rng.uniform(0.5, 2, (groups, self.n)) / high).astype(self.dtype),
        }
        if "Add" in self.op:
            self.arrays["bias"] = rng.normal(size=self.n).astype(self.dtype)
        if self.zero_point:
            self.arrays["zero_point"] = rng.integers(low, high, (groups, self.n)).astype(codes)

    def tensor(self, name: str) -> onnx.TensorProto:
        array = self.arrays[name]
        if name in ("w", "zero_point") and self.bits == 4 and array.dtype.itemsize == 1:
            kind = CODES[4, array.dtype == np.int8]
            raw = pack_nibbles(array).tobytes()
            return helper.make_tensor(name, kind, array.shape, raw, raw=True)
        return numpy_helper.from_array(array, name)

    def proto(self) -> onnx.ModelProto:
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        tensors = [self.tensor(name) for name in self.arrays]
        attributes = {"block_size": self.block_size, **self.attributes}
        attributes = {name: value for name, value in attributes.items() if value is not None}
        node = helper.make_node(self.op, ["x", *self.arrays], ["y"], "node_0", domain="qcompile", **attributes)
        inputs = [helper.make_tensor_value_info("x", kind, self.x_shape)]
        if not self.constant:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
        output = helper.make_tensor_value_info("y", kind, None)
        graph = helper.make_graph([node], "g", inputs, [output], tensors)
        bodies = (
            [ir.serde.serialize_function(functions.body(self.op, zero_points=self.zero_point))] if self.body else []
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", self.version)]
        return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)

    def model(self) -> bytes:
        return self.proto().SerializeToString()

    def x(self, *leading: int, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(*leading, self.k)).astype(self.dtype)

    def weight(self) -> np.ndarray:
        """(K, N) in float64, as docs/formats.md decodes it."""
        group = np.arange(self.k) // self.block_size
        zero = self.arrays["zero_point"].astype(np.float64)[group] if self.zero_point else 0.0
        return (self.arrays["w"].astype(np.float64) - zero) * self.arrays["scale"].astype(np.float64)[group]

    def expected(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weight() + self.arrays.get("bias", np.zeros(1)).astype(np.float64)


def bfloat16_model(case: Case) -> onnx.ModelProto:
    """The case's node between casts from and to float; scale and bias are rounded to bfloat16 in the case, too."""
    proto = case.proto()
    for tensor in proto.graph.initializer:
        if tensor.name in ("scale", "bias"):
            rounded = case.arrays[tensor.name].astype(ml_dtypes.bfloat16)
            case.arrays[tensor.name] = rounded.astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    (node,) = proto.graph.node
    node.input[0], node.output[0] = "x16", "y16"
    proto.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16))
    proto.graph.node.append(helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT))
    return proto


def open_session(model: bytes | Path, library: Path | None, threads: int = 1) -> ort.InferenceSession:
    """A session as an application makes it, without qcompile.runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error by Frobenius norms."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))
