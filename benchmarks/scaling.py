"""Time of a compile against the number of nodes: it must grow with them, and no faster.

    python benchmarks/scaling.py --nodes 1000 4000 20000

Graphs of many small nodes, generated here, go through lists of passes, each in a process of its own; the time is what
the processor worked for the whole command. `growth` is the exponent p of seconds ~ nodes^p between a row and the one
before it (1: linear).
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.files.load import save_model
from qcompile.models.tiny import tiny_decoder

LISTS: Mapping[str, tuple[str, ...]] = {
    "inspect": (),
    "dry-run": ("--passes", "pack", "--dry-run"),
    "pack": ("--passes", "pack"),
    "awq": ("--passes", "smooth,awq,pack"),
    "dynamic": ("--passes", "dynamic"),
    "qdq": ("--passes", "qdq"),
    "int8": ("--passes", "smooth,qdq,bias_correction"),
}
WIDTH, ROWS, SAMPLES = 32, 8, 16


class Chain:
    """A graph that is written node by node; its values are (ROWS, WIDTH), or (ROWS, WIDTH, 2, 2) for convolutions."""

    def __init__(self, *, image: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.random = np.random.default_rng(0)
        self.shape = ("rows", WIDTH, 2, 2) if image else ("rows", WIDTH)

    def weight(self, *, image: bool = False) -> str:
        """A permutation and a little noise: however long a chain is, its values neither die nor grow."""
        w = np.eye(WIDTH, dtype=np.float32)[self.random.permutation(WIDTH)]
        w += 1e-3 * self.random.standard_normal(w.shape).astype(np.float32)
        return self.constant(w.reshape(WIDTH, WIDTH, 1, 1) if image else w)

    def constant(self, array: np.ndarray) -> str:
        """The name of an initializer."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        """The name of a node's output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def saved(self, output: str, path: Path) -> int:
        """The model, written; its number of nodes."""
        self.nodes[-1].output[0] = "y"
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        made = helper.make_tensor_value_info("y", TensorProto.FLOAT, self.shape)
        graph = helper.make_graph(self.nodes, "scaling", [given], [made], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return len(self.nodes)


def relus(path: Path, nodes: int) -> int:
    """A product, a chain of Relus, a product."""
    chain = Chain()
    value = chain.node("MatMul", "x", chain.weight())
    for _ in range(nodes - 2):
        value = chain.node("Relu", value)
    return chain.saved(chain.node("MatMul", value, chain.weight()), path)


def linears(path: Path, nodes: int) -> int:
    """MatMul, Add, Relu, over and over."""
    chain, value = Chain(), "x"
    for _ in range(nodes // 3):
        value = chain.node("MatMul", value, chain.weight())
        value = chain.node("Add", value, chain.constant(np.full(WIDTH, 1e-4, np.float32)))
        value = chain.node("Relu", value)
    return chain.saved(value, path)


def convolutions(path: Path, nodes: int) -> int:
    """Conv, Relu, over and over."""
    chain, value = Chain(image=True), "x"
    for _ in range(nodes // 2):
        value = chain.node("Conv", value, chain.weight(image=True))
        value = chain.node("Relu", value)
    return chain.saved(value, path)


def fan(path: Path, nodes: int) -> int:
    """One value that products read, half of them, and one node that reads all of theirs."""
    chain = Chain()
    value = chain.node("Relu", "x")
    products = [chain.node("MatMul", value, chain.weight()) for _ in range(nodes - 2)]
    return chain.saved(chain.node("Sum", *products), path)


def copies(path: Path, nodes: int) -> int:
    """The same node over and over, and one that reads all of them."""
    chain = Chain()
    value = chain.node("MatMul", "x", chain.weight())
    return chain.saved(chain.node("Sum", *(chain.node("Relu", value) for _ in range(nodes - 2))), path)


def decoder(path: Path, nodes: int) -> int:
    """A tiny decoder, of 56 nodes a layer."""
    model = tiny_decoder(layers=max(nodes // 56, 1), hidden=64, heads=4, kv_heads=2, ffn=128, vocab=256)
    save_model(model, path)
    return len(model.graph)


GRAPHS: Mapping[str, Callable[[Path, int], int]] = {
    made.__name__: made for made in (relus, linears, convolutions, fan, copies, decoder)
}


def seconds(model: Path, options: tuple[str, ...], limit: float) -> float | str:
    """The processor time of a command, its threads together; what ended it, if it failed."""
    words = [sys.executable, "-m", "qcompile.compiler.cli"]
    if options:
        words += ["compile", str(model), "-o", str(model.parent / "out" / "model.onnx"), *options]
        words += ["--samples", str(SAMPLES), "--context", "32", "--min-coverage", "0", "--min-cosine", "0"]
        data = model.with_name("rows.npz")
        words += [] if not data.exists() or "dry-run" in str(options) else ["--calibration", str(data)]
    else:
        words += ["inspect", str(model)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["?"])[-1]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(graph: str, list_: str, sizes: list[int], limit: float) -> Iterator[str]:
    """Rows of the table for one graph and one list."""
    before: tuple[int, float] | None = None
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="qcompile-scaling-") as folder:
            model = Path(folder) / "model.onnx"
            nodes = GRAPHS[graph](model, size)
            if graph != "decoder":
                image = (2, 2) if graph == "convolutions" else ()
                draws = np.random.default_rng(1).random((SAMPLES * ROWS, WIDTH, *image), np.float32)
                np.savez(model.with_name("rows.npz"), x=draws)
            taken = seconds(model, LISTS[list_], limit)
        if isinstance(taken, str):
            yield f"| {graph} | {list_} | {nodes} | {taken} | | |"
            return
        growth = "" if before is None else f"{math.log(taken / before[1]) / math.log(nodes / before[0]):.2f}"
        yield f"| {graph} | {list_} | {nodes} | {taken:.1f} | {1e3 * taken / nodes:.2f} | {growth} |"
        before = nodes, taken


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 4000, 20000])
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a command is stopped")
    args = parser.parse_args()
    print("| graph | list | nodes | seconds | ms a node | growth |\n|---|---|---:|---:|---:|---:|")
    for graph in args.graphs:
        for list_ in args.lists:
            for row in rows(graph, list_, args.nodes, args.limit):
                print(row, flush=True)


if __name__ == "__main__":
    main()
