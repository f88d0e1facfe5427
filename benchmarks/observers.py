"""What observing the inputs of all linears costs, each observer against the plain forward of the same piece.

    python benchmarks/observers.py MODEL.onnx [--observers minmax,mse] [--context 512] [--threads 1] [--rounds 9]

The piece is the graph up to the inputs of its linears, tokenizer.json beside the model; the plain one gives their
shapes only. A round runs one window through every observer's session in turn, what happens in Python included; figures
are medians over rounds: the ratio within a round, and seconds a window.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qcompile.compiler.data.calibration import Calibration, Sampling, gather
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.compiler.walk.extract import extract
from qcompile.passes.linears import find_linears
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.nodes import add_outputs
from qcompile.passes.spec import ActivationSpec
from qcompile.runtime.sessions import run, session


class Plain(Extremes):
    """Looks at nothing: the activation is computed, its shape returned."""

    name: ClassVar[str] = "plain"

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.shape."""
        graph.node.append(helper.make_node("Shape", [self.value], [f"{self.value}.shape"]))
        add_outputs(graph, [f"{self.value}.shape"], TensorProto.INT64)

    def update(self, outputs: object) -> None:
        """Nothing."""

    range: Any = None


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--observers", default=",".join(OBSERVERS))
    parser.add_argument("--axis", type=int, help="channel axis; without it, one range for each tensor")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    model = load_model(args.model)
    plan = input_plan(model)
    sampling = Sampling(args.rounds + 1, args.context)
    batches = gather(plan, args.model, sampling, Calibration(), needed=True).calibration
    values = list(dict.fromkeys(linear.activation for linear in find_linears(model.graph)))
    steps, observed = {}, {}
    for own in (Plain, *(OBSERVERS[name] for name in args.observers.split(","))):
        parameters = {} if args.axis is None or own.name in ("gram", "plain") else {"axis": args.axis}
        observed[own.name] = [own(str(value.name), **parameters) for value in values]
        steps[own.name] = step(model, values, observed[own.name], args.threads)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, advance in steps.items():
            began = time.perf_counter()
            advance(batch.feeds)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    print_table(seconds, observed, len(values))


def step(model: ir.Model, values: list[ir.Value], observers: list[Observer], threads: int) -> Callable[[Any], None]:
    """What shows a batch to the observers."""
    piece = extract(model, [], values)
    graph = piece.proto.graph
    del graph.output[:]
    for observer in observers:
        observer.append(graph)
    names = [output.name for output in graph.output]
    made = session(piece.proto.SerializeToString(), weights=piece.weights, threads=threads, kernels="portable")

    def advance(feeds: Any) -> None:
        outputs = dict(zip(names, run(made, names, {n: a for n, a in feeds.items() if n in piece.inputs}), strict=True))
        for observer in observers:
            observer.update(outputs)

    return advance


def print_table(seconds: dict[str, list[float]], observed: dict[str, list[Observer]], values: int) -> None:
    """One Markdown row an observer; the ranges of an 8-bit grid, chosen once at the end, are timed apart."""
    print(f"| observer | s a window | times the plain forward | ms for the range of one of {values} activations |")
    print("|---|---|---|---|")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["plain"], strict=True))
        began = time.perf_counter()
        for observer in observed[name] if name != "plain" else ():
            observer.range(ActivationSpec())
        chosen = 1e3 * (time.perf_counter() - began) / values
        print(f"| {name} | {statistics.median(own):.3f} | {ratio:.2f} | {chosen:.1f} |")


if __name__ == "__main__":
    main()
