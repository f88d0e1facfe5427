"""The saved file run as applications run it: small ones as a whole, others segment by segment with mapped weights.

Invariant: both ways give the same numbers but for rounding of floats; and what is run by segments takes the memory of
its largest segment, however large the file is.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch, InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.memory import give_back
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.compiler.measure import randomness
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.walk.runner import Beside, Carried, Runner, Stream, went_on
from qcompile.compiler.walk.segments import is_large, split
from qcompile.compiler.walk.verify import run_file
from qcompile.compiler.walk.verify_saved import read_saved
from qcompile.passes.formats.nbits import ACCURACY_LEVEL
from qcompile.passes.rotation import MATRIX
from qcompile.runtime.sessions import session

# Bytes of files that one session runs: ONNX Runtime holds about 2.6 times as much, which is no more than what a compile
# holds anyway.
WHOLE = 128 << 20
# What rows of a table are looked up by: one that products read as well ties nothing together.
_LOOKUPS = ("Gather", "Embedding")
_BEFORE = ("DequantizeLinear", "Transpose")


def is_whole(path: Path) -> bool:
    """Whether one session runs the file."""
    return _bytes(path, read_saved(path)) <= WHOLE


def run_saved(
    path: Path,
    plan: InputPlan,
    batches: Sequence[Batch],
    provider: str,
    optimize: bool = True,
    *,
    floats: Collection[str] = (),
    more: Sequence[Batch] = (),
    each: Callable[[int, Arrays], None] = lambda number, outputs: None,
) -> list[Arrays]:
    """As `run_file`, by segments where the file is large."""
    whole = is_whole(path)
    if not whole:
        check_opens(path)
    run = run_file if whole else by_segments
    results = run(path, plan, batches, provider, optimize, floats=floats, more=more, each=each)
    give_back()
    return results


@phase("read the saved file")
def check_opens(path: Path) -> None:
    """Raise UserError where ONNX Runtime does not take the file as a whole: its segments are graphs of their own.

    Types, shapes and order are looked at, weights stay mapped: nothing is rewritten, copied or run.
    """
    session(path, kernels="portable", optimize=False, prepack=False, threads=1)


@phase("run the saved file")
def by_segments(
    path: Path,
    plan: InputPlan,
    batches: Sequence[Batch],
    provider: str,
    optimize: bool = True,
    *,
    floats: Collection[str] = (),
    more: Sequence[Batch] = (),
    each: Callable[[int, Arrays], None] = lambda number, outputs: None,
    between: Callable[[Carried], None] = lambda carried: None,
) -> list[Arrays]:
    """As `run_file`: each segment of the file runs by itself, on what the segments before it gave.

    Outputs for `more` are put aside until all are there. between: is shown what goes on behind each segment.
    """
    saved = read_saved(path)
    randomness.settle(saved)
    for node in saved.graph:
        if node.name in floats:
            node.attributes.pop(ACCURACY_LEVEL, None)
    runner, stream = Runner(saved, plan, provider, optimize=optimize), Stream(batches)
    aside = {str(value.name): Spill() for value in saved.graph.outputs}
    beside = Beside(Stream(more), aside) if more else None
    results: list[Arrays] = [{} for _ in batches]
    for segment in split(saved, is_heavy):
        after = runner.outputs(segment, stream, original=False, beside=beside)
        stream.quantized = went_on(segment, stream.quantized, after)
        between(stream.quantized)
        for kept, found in zip(results, after, strict=True):
            kept.update((name, array) for name, array in found.items() if name in aside)
    for number in range(len(more)):
        each(number, plan.decoded({name: spill[number] for name, spill in aside.items()}))
    return [plan.decoded(found) for found in results]


def is_heavy(node: ir.Node) -> bool:
    """Whether segments of a finished graph are made around the node: it computes with a large constant of its own, not
    with the matrix that turns all inputs.
    """
    if node.op_type.startswith(_LOOKUPS) or node.op_type in _BEFORE:
        return False
    values = (value for given in node.inputs if given is not None for value in _sources(given))
    return any(is_large(value) and not str(value.name).startswith(MATRIX) for value in values)


def _sources(value: ir.Value) -> list[ir.Value]:
    """The value, and what is before it where it is a decoded or turned constant."""
    found = [value]
    for current in found:  # grows while it is walked
        producer = current.producer()
        if producer is not None and producer.op_type in _BEFORE and producer.inputs[0] is not None:
            found.append(producer.inputs[0])
    return found


def _bytes(path: Path, saved: ir.Model) -> int:
    """Of the file and of all that it names."""
    tensors = [value.const_value for graph in saved.graphs() for value in graph.initializers.values()]
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in (path, *files))
