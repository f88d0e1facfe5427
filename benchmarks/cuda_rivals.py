"""The same layers in sessions of ONNX Runtime's CUDA provider: MatMulNBits, with and without fpA_intB, and ours.

    python benchmarks/cuda_rivals.py [--quick]

Each variant is a process of its own, since the environment chooses the kernel. A model is R copies of one layer that
read one x; a CUDA graph of the whole run is replayed (enable_cuda_graph), and the time is a replay's divided by R.
`fpA_intB` (ORT_FPA_INTB_GEMM=1) takes groups of 32 or 64 at most, symmetric: it gets groups of 32, the others 128.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPES = ((4096, 4096), (4096, 14336), (8192, 28672))
ROWS = (1, 8, 16, 64, 256)
QUICK_ROWS = (1, 16)
VARIANTS = {  # group, environment
    "MatMulNBits g128": (128, {}),
    "MatMulNBits g32": (32, {}),
    "MatMulNBits g32, fpA_intB": (32, {"ORT_FPA_INTB_GEMM": "1"}),
    "qcompile g128": (128, {}),
}
CACHE = 60 << 20  # bytes of the largest L2 here; copies exceed it three times


def layers(k: int, n: int, group: int, copies: int, *, ours: bool, half: bool = True) -> onnx.ModelProto:
    """`copies` layers y_i (M, N) = x (M, K) W_i, symmetric 4-bit codes, each with a weight of its own."""
    rng, groups = np.random.default_rng(0), k // group
    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    codes = rng.integers(0, 256, k * n // 2, np.uint8)
    scale = (rng.uniform(0.5, 1.5, (groups, n)) / (4 * math.sqrt(k))).astype(dtype)
    nodes, tensors, outputs = [], [], []
    for i in range(copies):
        inputs = ["x", f"w{i}", f"s{i}"]
        if ours:  # (K, N)
            tensors.append(helper.make_tensor(inputs[1], TensorProto.INT4, (k, n), codes.tobytes(), raw=True))
            tensors.append(numpy_helper.from_array(scale, inputs[2]))
            nodes.append(helper.make_node("MatMulInt4", inputs, [f"y{i}"], domain="qcompile", block_size=group))
        else:  # (N, groups, group / 2) and (N x groups,)
            tensors.append(numpy_helper.from_array(codes.reshape(n, groups, group // 2), inputs[1]))
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(scale.T).reshape(-1), inputs[2]))
            attributes = {"K": k, "N": n, "bits": 4, "block_size": group}
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", kind, ["m", n]))
    x = helper.make_tensor_value_info("x", kind, ["m", k])
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("com.microsoft", 1), ("qcompile", 1))]
    graph = helper.make_graph(nodes, "layers", [x], outputs, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def measure(variant: str, k: int, n: int, rows: list[int], *, provider: str = "cuda") -> dict[int, float]:
    """Seconds of one layer by number of rows; on the CPU without a graph, to try the models out."""
    import onnxruntime as ort

    group, _ = VARIANTS[variant]
    ours, gpu = variant.startswith("qcompile"), provider == "cuda"
    copies = max(2, math.ceil(3 * CACHE / (k * n / 2))) if gpu else 2
    model = layers(k, n, group, copies, ours=ours, half=gpu).SerializeToString()
    found = {}
    for m in rows:  # a captured graph is of one shape
        options = ort.SessionOptions()
        if ours:
            from qcompile.passes.library import library_path

            options.register_custom_ops_library(str(library_path()))
        chosen: list[Any] = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})] if gpu else ["CPUExecutionProvider"]
        session = ort.InferenceSession(model, options, providers=chosen)
        binding = session.io_binding()
        x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float16 if gpu else np.float32)
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, provider, 0))
        for i in range(copies):
            y = ort.OrtValue.ortvalue_from_shape_and_type([m, n], x.dtype.type, provider, 0)
            binding.bind_ortvalue_output(f"y{i}", y)
        times = []
        for _ in range(25):
            begin = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            times.append(time.perf_counter() - begin)
        found[m] = statistics.median(times[5:]) / copies
    return found


def table(rows: tuple[int, ...]) -> Iterator[str]:
    """µs of a layer by shape, M and variant."""
    yield "µs of a layer; the host's share of a replay included."
    yield "\n| shape | variant | " + " | ".join(f"M = {m}" for m in rows) + " |"
    yield "|---|---|" + "--:|" * len(rows)
    for k, n in SHAPES:
        for variant, (_, environment) in VARIANTS.items():
            command = [sys.executable, __file__, "--variant", variant, "--shape", f"{k}x{n}"]
            command += ["--m", ",".join(map(str, rows))]
            done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                yield f"| {k} × {n} | {variant} | {last[:200]} |" + " |" * (len(rows) - 1)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            yield f"| {k} × {n} | {variant} | " + " | ".join(f"{found[str(m)] * 1e6:.1f}" for m in rows) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer M")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--m", help=argparse.SUPPRESS)
    parser.add_argument("--provider", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        k, n = map(int, given.shape.split("x"))
        print(json.dumps(measure(given.variant, k, n, [int(m) for m in given.m.split(",")], provider=given.provider)))
        return
    try:
        import onnxruntime as ort
    except ImportError:
        sys.exit("no onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        sys.exit(f"onnxruntime {ort.__version__} here has no CUDAExecutionProvider")
    for line in table(QUICK_ROWS if given.quick else ROWS):
        print(line, flush=True)


if __name__ == "__main__":
    main()
