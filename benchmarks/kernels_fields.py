"""Products of int2, int3, int5, int6, int8 and pairs beside int4's, in turns in one process, without ONNX Runtime.

    python benchmarks/kernels_fields.py build/kernels/libqcompile_kernels.so --kernels avx512vbmi,avx2 --rows 1,256
    python benchmarks/kernels_fields.py LIBRARY --nbits --output benchmarks/results/kernels-fields.md

Weights are random, of integers asymmetric in groups of --group rows, of pairs with a scale a column, with float16
scales; as many copies of each are multiplied in turn as fill --cold megabytes, so that few rows read them from memory.
A round gives each format a turn, in an order that turns round. A row of a table: bytes a weight as packed, the shortest
time, that over int4's shortest, and the median over rounds of what it took over int4 in the same round; below 1 is
faster than int4.

--nbits: ONNX Runtime's MatMulNBits too, 2 bits (level 4, int8 activations), in the same rounds: a session of so many
nodes as there are copies, a node's share of a run.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompile.runtime.bench import cpu_name

WORDS = ("Int4", "Int2", "Int3", "Int5", "Int6", "Int8", "Pairs16", "Pairs32", "Pairs64", "Pairs128", "Pairs256")
NBITS = "MatMulNBits, 2 bits"
MANY = 64  # rows from which on a product is bound by arithmetic: one copy


def loaded(path: str) -> ctypes.CDLL:
    """The library with the types of what is called (c_api.h)."""
    library = ctypes.CDLL(path)
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.qcompile_weight_create.restype = pointer
    library.qcompile_weight_create.argtypes = [
        ctypes.c_char_p, size, size, size, ctypes.c_char_p, number, pointer, pointer, number, pointer,
    ]  # fmt: skip
    library.qcompile_weight_destroy.argtypes = [pointer]
    library.qcompile_weight_bytes.restype, library.qcompile_weight_bytes.argtypes = size, [pointer]
    library.qcompile_weight_multiply.argtypes = [pointer, pointer, number, size, pointer, pointer, number]
    return library


class Layer:
    """A size of weights and of x, and turns of products with them: each returns its seconds."""

    def __init__(self, library: ctypes.CDLL, kernel: str, shape: tuple[int, int], rows: int, args: argparse.Namespace):
        self.library, self.kernel, self.shape, self.rows, self.args = library, kernel, shape, rows, args
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((rows, shape[0])).astype(np.float32)
        self.y = np.empty((rows, shape[1]), np.float32)
        self.made = {word: self._weights(word, rng) for word in WORDS}
        self.turn = 0

    def _copies(self, size: int) -> int:
        return max(1, int(self.args.cold * 1e6 / size)) if self.rows < MANY else 1

    def _weights(self, word: str, rng: np.random.Generator) -> list[int]:
        (k, n), pairs = self.shape, word.startswith("Pairs")
        bits = np.log2(int(word[5:])) / 2 if pairs else int(word[3:])
        group = k if pairs else self.args.group
        codes = rng.integers(0, 256, int(k * n * bits) // 8, dtype=np.uint8)
        points = rng.integers(0, 256, (k // group + 8) * n, dtype=np.uint8)
        scale = (rng.random((k // group, n)) * 0.01 + 0.01).astype(np.float16)
        given = (self.kernel.encode(), k, n, group, word.encode(), 0, codes.ctypes.data, scale.ctypes.data)
        zeros = None if pairs else points.ctypes.data
        made = [self.library.qcompile_weight_create(*given, 1, zeros) for _ in range(self._copies(codes.size))]
        if None in made:
            raise SystemExit(f"{word}: no weight for {self.kernel}")
        return made

    def size(self, word: str) -> float:
        """Bytes a weight."""
        return int(self.library.qcompile_weight_bytes(self.made[word][0])) / self.shape[0] / self.shape[1]

    def multiply(self, word: str) -> float:
        """Seconds of a product with the next copy."""
        own, bits = self.made[word][self.turn % len(self.made[word])], self.args.bits
        start = time.perf_counter()
        self.library.qcompile_weight_multiply(own, self.x.ctypes.data, 0, self.rows, self.y.ctypes.data, None, bits)
        return time.perf_counter() - start

    def nbits(self) -> Callable[[], float]:
        """Turns of ONNX Runtime's 2-bit product: seconds of a node."""
        (k, n), group, rng = self.shape, self.args.group, np.random.default_rng(1)
        copies = self._copies(k * n // 4)
        tensors, nodes = [], []
        for i in range(copies):
            codes = rng.integers(0, 256, (n, k // group, group // 4), dtype=np.uint8)
            arrays = {"w": codes, "s": (rng.random((n, k // group)) * 0.01).astype(np.float32)}
            arrays["z"] = rng.integers(0, 256, (n, (k // group + 3) // 4), dtype=np.uint8)
            tensors += [numpy_helper.from_array(array, f"{name}{i}") for name, array in arrays.items()]
            attributes = {"K": k, "N": n, "bits": 2, "block_size": group, "accuracy_level": 4}
            inputs = ["x", *(f"{name}{i}" for name in arrays)]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        kind = TensorProto.FLOAT
        outputs = [helper.make_tensor_value_info(f"y{i}", kind, [self.rows, n]) for i in range(copies)]
        x = [helper.make_tensor_value_info("x", kind, [self.rows, k])]
        graph = helper.make_graph(nodes, "g", x, outputs, tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def turn() -> float:
            start = time.perf_counter()
            session.run(None, {"x": self.x})
            seconds = (time.perf_counter() - start) / copies
            self.multiply("Int8")  # what comes behind a session is slower for it: no format's turn
            return seconds

        return turn

    def free(self) -> None:
        """The weights."""
        for own in (own for copies in self.made.values() for own in copies):
            self.library.qcompile_weight_destroy(own)


def measured(layer: Layer, seconds: float, nbits: bool) -> dict[str, list[float]]:
    """Seconds of each format by round; without the first round."""
    turns: dict[str, Callable[[], float]] = {word: lambda word=word: layer.multiply(word) for word in WORDS}  # type: ignore[misc]
    if nbits:
        turns[NBITS] = layer.nbits()
    found: dict[str, list[float]] = {name: [] for name in turns}
    end = time.time() + seconds
    while time.time() < end or len(found["Int4"]) < 4:
        first = layer.turn % len(turns)
        for name in [*turns][first:] + [*turns][:first]:
            found[name].append(turns[name]())
        layer.turn += 1
    return {name: times[1:] for name, times in found.items()}


def table(layer: Layer, found: dict[str, list[float]]) -> Iterator[str]:
    """Rows of Markdown."""
    (k, n), four = layer.shape, found["Int4"]
    yield f"\n## {k} × {n}, {layer.rows} rows, {layer.args.bits}-bit activations, {layer.kernel}, {len(four)} rounds\n"
    yield "| format | bytes a weight | µs | over int4: of minima | median |"
    yield "|---|--:|--:|--:|--:|"
    for name, times in found.items():
        size = f"{layer.size(name):.3f}" if name in WORDS else ""
        median = statistics.median(own / base for own, base in zip(times, four, strict=True))
        yield f"| {name} | {size} | {min(times) * 1e6:.0f} | {min(times) / min(four):.2f} | {median:.2f} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--kernels", default="avx512vbmi", help="instruction sets (default avx512vbmi)")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="K×N")
    parser.add_argument("--rows", default="1,256", help="of x")
    parser.add_argument("--bits", type=int, default=8, help="of activations: 8 or 16")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--cold", type=int, default=160, help="megabytes")
    parser.add_argument("--seconds", type=float, default=10, help="of each table")
    parser.add_argument("--nbits", action="store_true")
    parser.add_argument("--output", type=Path, help="write the tables there")
    args = parser.parse_args()
    library, lines = loaded(args.library), [f"# Formats beside int4 on CPU ({time.strftime('%Y-%m-%d')})\n"]
    arguments = f"--kernels {args.kernels} --shapes {args.shapes} --rows {args.rows} --bits {args.bits}"
    lines.append(f"python benchmarks/kernels_fields.py LIBRARY {arguments}{' --nbits' if args.nbits else ''}\n")
    for shape in args.shapes.split(","):
        for kernel in args.kernels.split(","):
            for rows in map(int, args.rows.split(",")):
                k, n = map(int, shape.lower().replace("×", "x").split("x"))
                layer = Layer(library, kernel, (k, n), rows, args)
                lines += table(layer, measured(layer, args.seconds, args.nbits))
                layer.free()
    load = ", ".join(f"{own:.1f}" for own in os.getloadavg())
    machine = f"{cpu_name()}, {os.cpu_count()} cores, one thread, onnxruntime {ort.__version__}"
    lines.insert(2, f"{machine}; load averages at the end: {load}")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
