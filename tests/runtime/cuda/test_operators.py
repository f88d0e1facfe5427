"""The CUDA provider's operators inside ONNX Runtime without a GPU: on an emulated device (operators_check.cpp)."""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from cuda_host import on_host
from native_models import MALFORMED, OPERATORS, TABLES, Case, bfloat16_model, native_library, open_session, relative
from onnx import TensorProto, helper

from qcompile.models.tiny import tiny_decoder
from qcompile.runtime import session
from qcompile.runtime.library import cuda_architectures

# Relative errors: x of float is rounded to fp16; otherwise y is rounded, and for some routes the weights.
TOLERANCES = {"float": 6e-4, "half": 6e-4, "bfloat16": 4e-3}


@pytest.fixture(scope="module")
def library() -> Path:
    return on_host()


def _check(case: Case, library: Path, *leading: int, element: str = "float") -> np.ndarray:
    x = case.x(*leading)
    if element == "bfloat16":
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    proto = bfloat16_model(case) if element == "bfloat16" else case.proto()
    (y,) = open_session(proto.SerializeToString(), library).run(None, {"x": x})
    assert relative(y, case.expected(x)) < TOLERANCES[element]
    return y


@pytest.mark.parametrize("element", ["float", "half", "bfloat16"])
@pytest.mark.parametrize(("signed", "zero_point"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("op", OPERATORS)
def test_every_type(library: Path, op: str, signed: bool, zero_point: bool, element: str) -> None:
    """Odd K and N and a partial last group throughout."""
    case = Case(op, half=element == "half", signed=signed, zero_point=zero_point)
    _check(case, library, 2, 3, element=element)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0, 3), (2, 2, 3)])
def test_ranks_and_empty_inputs(library: Path, leading: tuple[int, ...]) -> None:
    _check(Case("MatMulAddInt4", x_shape=None), library, *leading)


@pytest.mark.parametrize("block_size", [7, 16, 32, 48, 64, 128, 1000])
def test_block_sizes(library: Path, block_size: int) -> None:
    for bits in (4, 8):
        _check(Case(f"MatMulInt{bits}", 301, 130, block_size, x_shape=("a", 301)), library, 5)


@pytest.mark.parametrize("element", TOLERANCES)
def test_rows_of_every_tile(library: Path, element: str) -> None:
    """Sums that several CTAs share, other numbers of rows in turn: what one run leaves behind, the next one meets."""
    case = Case("MatMulAddInt4", 1600, 130, 64, element == "half", x_shape=("a", 1600))
    proto = bfloat16_model(case) if element == "bfloat16" else case.proto()
    running = open_session(proto.SerializeToString(), library)
    for rows in (1, 65, 2, 17, 33, 1):
        x = case.x(rows, seed=rows)
        if element == "bfloat16":
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        first, second = (running.run(None, {"x": x})[0] for _ in range(2))
        assert relative(first, case.expected(x)) < TOLERANCES[element], f"{rows} rows"
        np.testing.assert_array_equal(first, second)


def test_activation_bits_change_nothing(library: Path) -> None:
    outputs = [_check(Case(attributes={"activation_bits": bits}), library, 1, 3) for bits in (8, 16)]
    np.testing.assert_array_equal(*outputs)


def test_shapes_are_inferred(library: Path) -> None:
    for half in (False, True):
        assert open_session(Case(half=half).model(), library).get_outputs()[0].shape == ["a", "b", 13]


def test_a_computed_bias(library: Path) -> None:
    case = Case("MatMulAddInt4")
    proto = case.proto()
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name == "bias")
    proto.graph.initializer.remove(bias)
    proto.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["n"]))
    running, x = open_session(proto.SerializeToString(), library), case.x(1, 2)
    (y,) = running.run(None, {"x": x, "bias": case.arrays["bias"]})
    assert relative(y, case.expected(x)) < TOLERANCES["float"]
    with pytest.raises(Exception, match=r"node 'node_0' \(MatMulAddInt4\): bias has shape \(12,\), w \(70, 13\) needs"):
        running.run(None, {"x": x, "bias": np.ones(12, np.float32)})


@pytest.mark.parametrize("name", ["w", "scale", "zero_point"])
def test_weights_must_be_constant(library: Path, name: str) -> None:
    case = Case("MatMulInt8")
    proto = case.proto()
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    with pytest.raises(Exception, match=rf"node 'node_0' \(MatMulInt8\): {name} is no constant .* without the library"):
        open_session(proto.SerializeToString(), library)


@pytest.mark.parametrize(("damage", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_malformed_nodes_are_refused_at_load(library: Path, damage: Callable[[Case], object], message: str) -> None:
    case = Case("MatMulAddInt4")
    damage(case)
    with pytest.raises(Exception) as caught:
        open_session(case.model(), library)
    assert re.search(message, str(caught.value)), caught.value


@pytest.fixture
def device(library: Path) -> Iterator[Any]:
    """What is set of the emulated device is set back."""
    functions = ctypes.CDLL(str(library))
    functions.qcompile_check_allocations.restype = ctypes.c_int64
    yield functions
    functions.qcompile_check_limit(ctypes.c_int64(1000))
    functions.qcompile_check_device(0)


def test_failures_of_cuda_name_the_node(library: Path, device: Any) -> None:
    running, x = open_session(Case().model(), library), Case().x(1, 2)
    device.qcompile_check_limit(ctypes.c_int64(0))
    with pytest.raises(Exception, match=r"node 'node_0' \(MatMulInt4\): cannot allocate a weight: out of memory"):
        open_session(Case().model(), library)
    device.qcompile_check_device(1)
    with pytest.raises(Exception, match=r"node 'node_0' \(MatMulInt4\): the weight lies on another device"):
        running.run(None, {"x": x})
    device.qcompile_check_device(0)
    (y,) = running.run(None, {"x": x})
    assert relative(y, Case().expected(x)) < TOLERANCES["float"], "a failed run leaves the kernel usable"


def test_device_memory_goes_with_the_session(library: Path, device: Any) -> None:
    running = open_session(Case().model(), library)
    taken = device.qcompile_check_allocations()
    others = [open_session(Case(op).model(), library) for op in OPERATORS]
    assert device.qcompile_check_allocations() == taken + len(others), "one allocation a weight"
    del others
    assert device.qcompile_check_allocations() == taken
    del running
    assert device.qcompile_check_allocations() == taken - 1


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_scratch_goes_back(library: Path) -> None:
    """Each run takes 0.5 MB for x, which it copies; 20 runs would be 10 MB."""
    case = Case("MatMulInt4", 33000, 8, 128, half=True, x_shape=("a", 33000))
    running, x = open_session(case.model(), library), case.x(8)
    running.run(None, {"x": x})
    before = _resident()
    for _ in range(20):
        running.run(None, {"x": x})
    assert _resident() - before < 4e6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_compiled_decoder(library: Path, bench, bits: int) -> None:
    """A whole model, its head tied to the embedding and its products fused, against the portable bodies."""
    bench.compile(bench.save(tiny_decoder(tied=True)), "pack,fuse", bits=bits)
    path = bench.folder / "out" / "model.onnx"
    assert any(node.op_type.startswith("MatMul") for node in onnx.load(path).graph.node if node.domain == "qcompile")
    ids = np.array([[5, 17, 42, 99, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wanted = session(path, kernels="portable").run(None, feeds)[0]
    assert relative(open_session(path, library).run(None, feeds)[0], wanted) < 5e-3


@pytest.mark.parametrize("table", TABLES)
def test_a_format_without_a_kernel_is_not_registered_and_its_body_runs(library: Path, table: str) -> None:
    case = Case(f"MatMulAdd{table}")
    with pytest.raises(Exception, match="is not a registered function/op"):
        open_session(case.model(), library)
    case.body, x = True, case.x(1, 2)
    (y,) = open_session(case.model(), library).run(None, {"x": x})
    assert relative(y, case.expected(x)) < 2e-2, "ONNX Runtime rounds activations to int8 where it fuses the body"


def test_bfloat16_has_no_operator_on_the_cpu() -> None:
    built = native_library()
    if not cuda_architectures(built):
        pytest.skip("the library was built without CUDA, and knows no bfloat16")
    with pytest.raises(Exception, match=r"Could not find an implementation for MatMulInt4\(1\) node"):
        open_session(bfloat16_model(Case()).SerializeToString(), built)
