"""What the tests of the native library share: the library, and models of one operator with their float64 results."""

import shutil
from collections.abc import Callable
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

from qcompile.passes.bit_fields import FIELDS, pack_fields, unpack_fields
from qcompile.passes.codebooks import CODEBOOKS
from qcompile.passes.errors import UserError
from qcompile.passes.formats import FORMATS, OTHERS, by_operator, functions
from qcompile.passes.formats.base import BIASED, COLUMNS_AT_8, PRODUCT, pack_nibbles
from qcompile.passes.formats.bits import BitFields
from qcompile.passes.formats.codebook import CodebookPairs
from qcompile.passes.library import library_path
from qcompile.runtime.sessions import session

# What the CUDA kernels have, too.
OPERATORS = ("MatMulInt4", "MatMulInt8", "MatMulAddInt4", "MatMulAddInt8")
# All that the rows of formats say to be there, and their ends; the ends of those in fields of bits, and of those whose
# codes are looked up in a table.
WORDS = tuple(word for own in (*FORMATS, *OTHERS) for word in own.native)
NATIVE = tuple(kind + word for word in WORDS for kind in (PRODUCT, BIASED))
IN_FIELDS = tuple(own.native[0] for own in FORMATS if isinstance(own, BitFields))
PAIRS = {own.native[0]: own for own in FORMATS if isinstance(own, CodebookPairs)}
TABLES = tuple(word for word in WORDS if PRODUCT + word not in OPERATORS and word not in (*IN_FIELDS, *PAIRS))
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
        self.bits, self.word = _named(self.op)
        if self.pairs is not None:
            self.block_size, self.bits = self.k, self.pairs.code_bits
        rng, groups = np.random.default_rng(self.seed), -(-self.k // self.block_size)
        self.dtype = np.float16 if self.half else np.float32
        if not self.affine:
            self.signed = self.zero_point = False
        if self.in_fields:
            self.signed = False
        low, high = (-(1 << (self.bits - 1)), 1 << (self.bits - 1)) if self.signed else (0, 1 << self.bits)
        codes, rows = np.int8 if self.signed else np.uint8, self.k if self.pairs is None else (self.k + 1) // 2
        self.arrays = {
            "w": rng.integers(low, high, (rows, self.n)).astype(codes),
            "scale": (rng.uniform(0.5, 2, (groups, self.n)) / high).astype(self.dtype),
        }
        if self.byte_scales:
            ends = (30, 60) if self.tensor_scale else (118, 126)
            self.arrays["scale"] = rng.integers(*ends, (groups, self.n)).astype(np.uint8)
        if "Add" in self.op:
            self.arrays["bias"] = rng.normal(size=self.n).astype(self.dtype)
        if self.zero_point:
            self.arrays["zero_point"] = rng.integers(low, high, (groups, self.n)).astype(codes)
        if self.in_fields:
            self.arrays |= {name: pack_fields(self.arrays[name], self.bits) for name in self._coded()}

    @property
    def in_fields(self) -> bool:
        """Whether codes, and zero points where there are some, are fields of bits in bytes."""
        return self.word in IN_FIELDS or self.pairs is not None

    @property
    def pairs(self) -> CodebookPairs | None:
        """The format of one code for two rows."""
        return PAIRS.get(self.word)

    def _coded(self) -> list[str]:
        return [name for name in ("w", "zero_point") if name in self.arrays]

    @property
    def affine(self) -> bool:
        """Whether codes are integers, which may have zero points."""
        return "zero_point" in _inputs(self.op)

    @property
    def byte_scales(self) -> bool:
        """Whether scales are stored in bytes; an attribute then says the type of x."""
        return "dtype" in _attributes(self.op)

    @property
    def tensor_scale(self) -> bool:
        """Whether they are E4M3 numbers, which an attribute says a power of two to."""
        return "exponent" in _attributes(self.op)

    def tensor(self, name: str) -> onnx.TensorProto:
        array = self.arrays[name]
        if name in ("w", "zero_point") and self.bits == 4 and not self.in_fields and array.dtype.itemsize == 1:
            kind = CODES[4, array.dtype == np.int8]
            raw = pack_nibbles(array).tobytes()
            return helper.make_tensor(name, kind, array.shape, raw, raw=True)
        return numpy_helper.from_array(array, name)

    def proto(self) -> onnx.ModelProto:
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        tensors = [self.tensor(name) for name in self.arrays]
        standard = {"block_size": self.block_size} | ({"dtype": kind} if self.byte_scales else {})
        standard |= {"exponent": 0} if self.tensor_scale else {}
        standard |= {"K": self.k} if self.in_fields else {}
        attributes = {**standard, **self.attributes}
        attributes = {name: value for name, value in attributes.items() if value is not None}
        node = helper.make_node(self.op, ["x", *self.arrays], ["y"], "node_0", domain="qcompile", **attributes)
        inputs = [helper.make_tensor_value_info("x", kind, self.x_shape)]
        if not self.constant:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
        output = helper.make_tensor_value_info("y", kind, None)
        graph = helper.make_graph([node], "g", inputs, [output], tensors)
        bodies = [ir.serde.serialize_function(self._function())] if self.body else []
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", self.version)]
        return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)

    def _function(self) -> ir.Function:
        made = functions.body(self.op, zero_points=self.zero_point)
        if COLUMNS_AT_8 in self.attributes:
            made.attributes.add(ir.AttrInt64s(COLUMNS_AT_8, []))
        return made

    def model(self) -> bytes:
        return self.proto().SerializeToString()

    def x(self, *leading: int, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(*leading, self.k)).astype(self.dtype)

    def weight(self) -> np.ndarray:
        """(K, N) in float64, as docs/formats.md decodes it."""
        if self.pairs is not None:
            codes = unpack_fields(self.arrays["w"], self.bits, (self.k + 1) // 2)
            levels = CODEBOOKS[self.bits].pairs[codes].transpose(0, 2, 1).reshape(-1, self.n)[: self.k]
            return levels.astype(np.float64) * self.arrays["scale"].astype(np.float64)
        if not self.affine:
            return decoded(self.word, self.arrays["w"], self.arrays["scale"], self.block_size)
        group = np.arange(self.k) // self.block_size
        codes = {name: self.arrays[name] for name in self._coded()}
        if self.in_fields:
            rows = {"w": self.k, "zero_point": len(self.arrays["scale"])}
            codes = {name: unpack_fields(array, self.bits, rows[name]) for name, array in codes.items()}
        absent = 1 << (self.bits - 1) if self.in_fields else 0
        zero = codes["zero_point"].astype(np.float64)[group] if self.zero_point else absent
        return (codes["w"].astype(np.float64) - zero) * self.arrays["scale"].astype(np.float64)[group]

    def expected(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weight() + self.arrays.get("bias", np.zeros(1)).astype(np.float64)


def decoded(word: str, codes: np.ndarray, scale: np.ndarray, block_size: int) -> np.ndarray:
    """(K, N) in float64 of codes (K, N) that a table is for: what the body of their product makes of the identity."""
    case = Case(PRODUCT + word, *codes.shape, block_size, body=True, x_shape=("rows", len(codes)))
    case.arrays = {"w": codes.astype(np.uint8), "scale": scale if case.byte_scales else scale.astype(np.float32)}
    plain = session(case.model(), kernels="portable", optimize=False, threads=1)
    return np.asarray(plain.run(None, {"x": np.eye(len(codes), dtype=np.float32)})[0], np.float64)


def _named(op: str) -> tuple[int, str]:
    """(bits of a code, word of the format) of an operator."""
    own = by_operator(op)
    assert own is not None
    return own.bits, own.operators[op][1]


def _inputs(op: str) -> list[str | None]:
    return [value.name for value in functions.body(op).inputs]


def _attributes(op: str) -> list[str]:
    return list(functions.body(op).attributes)


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


Damage = Callable[[Case], object]


def _shape(name: str, *dims: int) -> Damage:
    """Replaces an initializer by ones of another shape."""
    return lambda case: case.arrays.update({name: np.ones(dims, case.arrays[name].dtype)})


def _dtype(name: str, dtype: type) -> Damage:
    return lambda case: case.arrays.update({name: case.arrays[name].astype(dtype)})


def _attribute(name: str, value: object) -> Damage:
    return lambda case: case.attributes.update({name: value})


def _x_shape(*dims: int | str) -> Damage:
    return lambda case: setattr(case, "x_shape", dims)


# What is wrong, and what the message says. Those without the node's name are ONNX Runtime's own.
MALFORMED = [
    (
        _attribute("block_size", None),
        r"MatMulAddInt4\): the integer attribute block_size is missing: compile the model",
    ),
    (_attribute("block_size", 0), r"node 'node_0' \(MatMulAddInt4\): block_size is 0, it must be 1 to 2147483648"),
    (_attribute("block_size", -32), r"block_size is -32"),
    (_attribute("block_size", 1 << 62), r"block_size is 4611686018427387904"),
    (_attribute("block_size", 32.0), r"attribute block_size must be an integer"),
    (_attribute("block_size", 64), r"scale has shape \(3, 13\), w \(70, 13\) with block_size 64 needs \(2, 13\)"),
    (_attribute("activation_bits", 4), r"activation_bits is 4, it must be 8 or 16"),
    (_attribute("activation_bits", 8.0), r"attribute activation_bits must be an integer"),
    (_attribute("activation_bits", "8"), r"attribute activation_bits must be an integer"),
    *(
        (_attribute(COLUMNS_AT_8, ranges), r"MatMulAddInt4\): columns_at_8 must be begins and ends .* the 13 columns")
        for ranges in ([0, 14], [3], [5, 2], [-1, 4], [0, 4, 6])
    ),
    (_attribute("version", 2), r"needs operators version 2 of domain qcompile, this library knows 1: upgrade"),
    (_shape("w", 70), r"w has shape \(70,\), it must have 2 dimensions"),
    (_shape("w", 2, 35, 13), r"w has shape \(2, 35, 13\), it must have 2 dimensions"),
    (_shape("w", 0, 13), r"w has shape \(0, 13\), K and N must be 1 to 2147483648"),
    (_shape("w", 70, 0), r"w has shape \(70, 0\), K and N must be 1 to"),
    (_shape("w", 71, 13), r"x has shape \(\?, \?, 70\), its last dimension must be the 71 rows of w"),
    (_shape("scale", 39), r"scale has shape \(39,\), it must have 2 dimensions"),
    (_shape("scale"), r"scale has shape \(\), it must have 2 dimensions"),
    (_shape("scale", 13, 3), r"scale has shape \(13, 3\), w \(70, 13\) with block_size 32 needs \(3, 13\)"),
    (_shape("scale", 2, 13), r"scale has shape \(2, 13\)"),
    (_shape("zero_point", 3, 12), r"zero_point has shape \(3, 12\)"),
    (_shape("bias", 1), r"bias has shape \(1,\), w \(70, 13\) needs \(13,\)"),
    (_shape("bias", 1, 13), r"bias has shape \(1, 13\), it must have 1 dimensions"),
    (_x_shape("a", 69), r"x has shape \(\?, 69\), its last dimension must be the 70 rows of w"),
    (_dtype("scale", np.float16), r"Op \(MatMulAddInt4\).* no kernel def matches node inputs"),
    (_dtype("scale", np.float64), r"Type 'tensor\(double\)' of input parameter \(scale\)"),
    (_dtype("zero_point", np.int8), r"Op \(MatMulAddInt4\).* no kernel def matches node inputs"),
    (_dtype("bias", np.float16), r"Op \(MatMulAddInt4\).* no kernel def matches node inputs"),
    (_dtype("w", np.float32), r"Type 'tensor\(float\)' of input parameter \(w\) of operator \(MatMulAddInt4\)"),
]


@dataclass(frozen=True)
class Weight:
    """codes (K, N), scale and zero_point (groups, N); zero_point None: 0. table: word of a format that has one."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    block_size: int
    bits: int
    signed: bool
    table: str = ""

    @property
    def word(self) -> str:
        """The end of the operators' names."""
        return self.table or f"Int{self.bits}"

    def decoded(self) -> np.ndarray:
        """(K, N) float64."""
        if self.table:
            return decoded(self.table, self.codes, self.scale, self.block_size)
        group = np.arange(len(self.codes)) // self.block_size
        absent = 1 << (self.bits - 1) if self.bits in FIELDS else 0
        zero_point = absent if self.zero_point is None else self.zero_point[group].astype(np.float64)
        return (self.codes - zero_point) * self.scale[group].astype(np.float64)

    def stored(self, values: np.ndarray) -> np.ndarray:
        """As ONNX has it: two elements of 4 bits in a byte, the first one low, over the whole tensor; or as fields."""
        if self.bits in FIELDS:
            return pack_fields(values, self.bits)
        flat = values.reshape(-1).astype(np.uint8)  # negative ones wrap to two's complement
        if self.bits == 8:
            return flat
        flat = np.append(flat & 15, np.zeros(flat.size % 2, np.uint8))
        return flat[0::2] | flat[1::2] << 4
