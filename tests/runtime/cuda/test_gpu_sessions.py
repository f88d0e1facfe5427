"""The CUDA operators inside ONNX Runtime's CUDA provider, against float64. Unverified until a GPU ran them.

Needs onnxruntime-gpu, a GPU, and a library that was built with CUDA; `benchmarks/gpu_session.sh` runs it. The same
operators run without a GPU in tests/runtime/cuda/test_operators.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from native_models import OPERATORS, Case, bfloat16_model, native_library, relative
from onnx import helper

from qcompile.models.tiny import tiny_decoder
from qcompile.runtime import session
from qcompile.runtime.library import why_no_cuda

pytestmark = pytest.mark.gpu

PROVIDER, DEVICE = "CUDAExecutionProvider", "cuda"
# Relative errors: what is rounded to the element, weights and x included (fp32 is computed in fp16).
TOLERANCES = {"float": 1e-3, "half": 1e-3, "bfloat16": 6e-3}
ROWS = (1, 3, 17, 64, 65, 300)


@pytest.fixture(scope="module")
def library() -> Path:
    if PROVIDER not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    built = native_library()
    if reason := why_no_cuda(built):
        pytest.skip(reason)
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return built


def _open(proto: onnx.ModelProto, library: Path, **provider_options: str) -> ort.InferenceSession:
    """A session that fails where a node would fall back to the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=[(PROVIDER, provider_options)])


def _made(case: Case, element: str) -> onnx.ModelProto:
    return bfloat16_model(case) if element == "bfloat16" else case.proto()


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize(("signed", "zero_point"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("op", OPERATORS)
def test_every_type(library: Path, op: str, signed: bool, zero_point: bool, element: str) -> None:
    for k, n, block_size in ((70, 13, 32), (1024, 320, 128)):
        case = Case(op, k, n, block_size, element == "half", signed, zero_point, x_shape=None)
        running = _open(_made(case, element), library)
        for rows in ROWS:
            x = case.x(rows)
            (y,) = running.run(None, {"x": x})
            assert relative(y, case.expected(x)) < TOLERANCES[element], f"{k} x {n}, {rows} rows"


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 2, 3)])
def test_ranks_and_empty_inputs(library: Path, leading: tuple[int, ...]) -> None:
    case = Case("MatMulAddInt4", half=True, x_shape=None)
    x = case.x(*leading)
    (y,) = _open(case.proto(), library).run(None, {"x": x})
    assert relative(y, case.expected(x)) < TOLERANCES["half"]


def test_weights_must_be_constant(library: Path) -> None:
    with pytest.raises(Exception, match=r"node 'node_0' \(MatMulInt4\): w is no constant of the model"):
        _open(Case(half=True, constant=False).proto(), library)


def _chain(count: int, size: int) -> tuple[onnx.ModelProto, list[Case]]:
    """Products of (size, size) one behind the other, with a Tanh between them: x (m, size) -> y (m, size) fp16."""
    cases = [Case("MatMulAddInt4", size, size, 64, half=True, seed=i, x_shape=("m", size)) for i in range(count)]
    nodes, tensors = [], []
    for i, case in enumerate(cases):
        proto = case.proto()
        node = proto.graph.node[0]
        node.name = f"node_{i}"
        node.input[:] = ["x" if i == 0 else f"h{i}", *(f"{name}_{i}" for name in node.input[1:])]
        node.output[0] = f"p{i}"
        for tensor in proto.graph.initializer:
            tensor.name += f"_{i}"
            tensors.append(tensor)
        nodes += [node, helper.make_node("Tanh", [f"p{i}"], ["y" if i == count - 1 else f"h{i + 1}"])]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["m", size]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), cases


def _wanted(cases: list[Case], x: np.ndarray) -> np.ndarray:
    h = x.astype(np.float64)
    for case in cases:
        h = np.tanh(case.expected(h))
    return h


def test_rows_come_and_go(library: Path) -> None:
    """Scratch of one product is memory of the next: a chain, with other numbers of rows each time."""
    proto, cases = _chain(4, 256)
    running = _open(proto, library)
    for rows in (1, 300, 2, 64, 1, 129):
        x = cases[0].x(rows, seed=rows)
        (y,) = running.run(None, {"x": x})
        assert relative(y, _wanted(cases, x)) < 0.02, f"{rows} rows"


def test_threads_and_sessions_at_once(library: Path) -> None:
    """Runs of one session and of another give the bits of a session alone."""
    proto, cases = _chain(3, 256)
    running = [_open(proto, library), _open(proto, library)]
    inputs = [cases[0].x(rows, seed=rows) for rows in (1, 17, 130)]
    alone = [running[0].run(None, {"x": x})[0] for x in inputs]
    jobs = [(one, i) for one in running for i in range(len(inputs))] * 20
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0].run(None, {"x": inputs[job[1]]})[0], jobs))
    for (_, i), y in zip(jobs, found, strict=True):
        np.testing.assert_array_equal(y, alone[i])


def _bound(running: Any, x: Any, y: Any) -> None:
    binding = running.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    running.run_with_iobinding(binding)
    binding.synchronize_outputs()


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_cuda_graphs(library: Path, rows: int) -> None:
    """Captured by ONNX Runtime in the first run, replayed in the others with other inputs."""
    proto, cases = _chain(3, 512)
    plain, graphed = _open(proto, library), _open(proto, library, enable_cuda_graph="1")
    first = cases[0].x(rows)
    x, y = (ort.OrtValue.ortvalue_from_numpy(array, DEVICE, 0) for array in (first, np.zeros_like(first)))
    for seed in range(5):
        values = cases[0].x(rows, seed=seed)
        x.update_inplace(values)
        y.update_inplace(np.full_like(values, np.nan))
        _bound(graphed, x, y)
        np.testing.assert_array_equal(y.numpy(), plain.run(None, {"x": values})[0])


def test_session_of_the_package(library: Path) -> None:
    case = Case("MatMulInt4", half=True, body=True)
    x = case.x(1, 3)
    for kernels in ("native", "portable"):
        (y,) = session(case.model(), providers=("cuda",), kernels=kernels).run(None, {"x": x})
        assert relative(y, case.expected(x)) < TOLERANCES["half"], kernels


@pytest.mark.parametrize("bits", [4, 8])
def test_a_compiled_decoder(library: Path, bench, bits: int) -> None:
    """A whole model in fp32, head tied to the embedding: its logits against those of the portable bodies on the CPU."""
    bench.compile(bench.save(tiny_decoder(tied=True)), "pack,fuse", bits=bits)
    path = bench.folder / "out" / "model.onnx"
    ids = np.array([[5, 17, 42, 99, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wanted = session(path, kernels="portable").run(None, feeds)[0]
    found = session(path, providers=("cuda",), kernels="native").run(None, feeds)[0]
    assert relative(found, wanted) < 5e-3
