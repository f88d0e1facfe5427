"""Trust, but run it: every packed node against its weights, the whole model before and after the disk."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch, InputPlan, complete
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.metrics import OutputNoise
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.measure.randomness import repeatable
from qcompile.compiler.results.errors import NodeError, OutputError
from qcompile.compiler.walk.extract import Piece
from qcompile.compiler.walk.verify_products import EXACT, ratio
from qcompile.passes.errors import UserError, Verdict
from qcompile.passes.formats.nbits import ACCURACY_LEVEL
from qcompile.passes.observers import nodes as observers
from qcompile.passes.state import Twin, node_state, set_node
from qcompile.runtime.sessions import run

# Numbers of outputs that are compared at once.
_NUMBERS = 1 << 20
# Operators behind a Sigmoid that leave its numbers as they are.
_MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Cast")


def probe_twins(piece: Piece, nodes: Sequence[ir.Node]) -> list[str]:
    """Add to a piece, beside each node that a pass made integer, the float node it stands for, and compare.

    The float node has all outputs of the integer one, under names of its own, and each is compared.
    """
    names: list[str] = []
    for node in nodes:
        twin = node_state(node).twin
        if twin is None:
            continue
        y, made = str(node.outputs[0].name), onnx.NodeProto()
        made.CopyFrom(twin.proto)
        del made.input[:], made.output[:]
        given = [value.name or "" for value in node.outputs]
        made.name, made.output[:] = f"{y}.twin", [f"{name}.twin" if name else "" for name in given]
        made.input.extend(_twin_input(piece, y, twin, value) for value in twin.inputs)
        piece.proto.graph.node.append(made)
        for name in filter(None, given):
            names += observers.compare(piece.proto.graph, name, f"{name}.twin", ".twin")
    return names


def _twin_input(piece: Piece, y: str, twin: Twin, value: ir.Value | None) -> str:
    if value is None:
        return ""
    if value.const_value is None:
        return str(value.name)
    return piece.add_weight(f"{y}.twin.{value.name}", twin.array(value))


def twin_errors(nodes: Sequence[ir.Node], outputs: Sequence[Arrays]) -> list[NodeError]:
    """Errors of the integer nodes against the float ones on the same inputs."""
    found = []
    for node in nodes:
        twin = node_state(node).twin
        if twin is not None:
            set_node(node, twin=None)
            error = _ratio([value.name for value in node.outputs if value.name], ".twin", outputs)
            bits = _activation_bits(node, twin)
            found.append(NodeError(node.name or "", error, 0.0, activation_bits=bits, weights=twin.weights))
    return found


def _activation_bits(node: ir.Node, twin: Twin) -> int:
    """Bits that the activation of an integer node is rounded to; 16 stands for float, too."""
    if twin.weights_only:
        return 16
    back = node.inputs[0].producer() if node.inputs[0] is not None else None
    codes = back.inputs[0] if back is not None and back.op_type == "DequantizeLinear" else None
    return codes.dtype.bitwidth if codes is not None and codes.dtype is not None else 8


def _ratio(values: Sequence[str], end: str, outputs: Sequence[Arrays]) -> float:
    """‖y - reference‖ / ‖reference‖ over all batches and all outputs of a node together: 1 where there is an error and
    no reference, inf where one of both is NaN or infinite.
    """
    difference = sum(_total(observers.difference(y, end), outputs) for y in values)
    return ratio(difference, sum(_total(observers.reference(y, end), outputs) for y in values))


def _total(name: str, outputs: Sequence[Arrays]) -> float:
    return sum(float(batch[name]) for batch in outputs)


def probabilities(model: ir.Model) -> set[str]:
    """Names of the outputs that a Sigmoid gives, through operators that only move numbers perhaps."""
    found = set()
    for output in model.graph.outputs:
        producer = output.producer()
        while producer is not None and producer.op_type in _MOVES and producer.inputs[0] is not None:
            producer = producer.inputs[0].producer()
        if producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid"):
            found.add(str(output.name))
    return found


def silent(compiled: Sequence[Arrays], original: Sequence[Arrays], sigmoids: Collection[str]) -> set[str]:
    """Names of outputs without a direction that quantization could change.

    Case 1: it is 0 throughout in the float model.
    Case 2: a Sigmoid's, of which no number changes its side of 1/2 and all float ones lie below: a detector that finds
            nothing in either form gives small numbers of any direction.
    """
    found = set()
    for name in original[0]:
        floats, made = ([batch[name] for batch in batches if name in batch] for batches in (original, compiled))
        nothing = name in sigmoids and not any(np.any(array > 0.5) for array in (*floats, *made))  # Case 2
        if nothing or not any(np.any(array) for array in floats):  # Case 1
            found.add(name)
    return found


def compare_outputs(compiled: Sequence[Arrays], original: Sequence[Arrays]) -> list[OutputError]:
    """Every float output that both have, in one shape; UserError where a number of the compiled one alone is NaN, or
    infinite in an output that has not as many infinities in the float model: log(relu(x)) crosses 0 here or there.

    Outputs whose shape depends on their content (boxes that were found) may have another one; they are left out.
    UserError as well where there is not one number in all outputs: a check of nothing tells nothing.
    """
    if not any(np.isfinite(array).any() if array.dtype.kind == "f" else array.size for array in _all(original)):
        raise UserError(
            "the float model's outputs hold not a single number on the check batches (are they without rows, or NaN "
            "throughout?): nothing could be verified; give calibration data with rows that it computes"
        )
    names = [name for name in original[0] if name in compiled[0] and original[0][name].dtype.kind == "f"]
    pairs = {name: ([a[name] for a in compiled], [b[name] for b in original]) for name in names}
    return [
        _compared(name, a, b)
        for name, (a, b) in pairs.items()
        if all(x.shape == y.shape for x, y in zip(a, b, strict=True)) and any(y.size for y in b)
    ]


def _all(batches: Sequence[Arrays]) -> Iterator[npt.NDArray[Any]]:
    return (array for arrays in batches for array in arrays.values())


def _compared(name: str, a: Sequence[npt.NDArray[Any]], b: Sequence[npt.NDArray[Any]]) -> OutputError:
    """Of arrays a and b by batch; float64 of a few rows at a time."""
    lost = poles = infinite = size = 0
    largest = 0.0
    for x, y in _parts(a, b):
        gone = np.isfinite(y) & ~np.isfinite(x)
        over = np.isinf(x) & np.isfinite(y)  # 1 / relu(x)
        keep = np.isfinite(x) & np.isfinite(y)
        lost, poles = lost + int(gone.sum()), poles + int(over.sum())
        infinite, size = infinite + int(np.isinf(y).sum()), size + y.size
        largest = max(largest, np.abs(x[keep]).max(initial=0.0), np.abs(y[keep]).max(initial=0.0))
    if lost > poles or poles > infinite:
        raise UserError(
            f"output {name} of the compiled model is NaN or infinite where the float model's is not "
            f"({lost} of {size} numbers)"
        )
    sums, rows = np.zeros(4), OutputNoise()
    for x, y in _parts(a, b):
        keep = np.isfinite(x) & np.isfinite(y)
        u, v = (part[keep] / (largest or 1.0) for part in (x, y))  # squares of 1e200 or 1e-200 are none
        sums += [np.square(u - v).sum(), u @ u, v @ v, u @ v]
    for part, known in zip(a, b, strict=True):
        usable = np.isfinite(part) & np.isfinite(known)
        rows.add(np.where(usable, known, 0), np.where(usable, part, 0))
    difference, norm, scale = np.sqrt(sums[:3]).tolist()
    relative = difference / scale if scale else float(difference > 0)
    cosine = float(sums[3] / (scale * norm)) if scale and norm else float(scale == norm)
    return OutputError(name, relative, cosine, rows.deviation)


def _parts(
    a: Sequence[npt.NDArray[Any]], b: Sequence[npt.NDArray[Any]]
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Numbers of both, side by side, so many at a time."""
    for x, y in zip(a, b, strict=True):
        for start in range(0, x.size, _NUMBERS):
            own = slice(start, start + _NUMBERS)
            yield x.reshape(-1)[own].astype(np.float64), y.reshape(-1)[own].astype(np.float64)


def check_outputs(errors: Sequence[OutputError], nodes: Sequence[NodeError], least: float) -> None:
    """Raise Verdict where an output's cosine to the float one is below `least`, naming the node that is worst.

    1/2 is where the noise has three times the power of the signal: nothing that reads such an output can work, while
    the coarsest sound compiles (4 bits, rounded to nearest) lie above 0.9. least: 0 judges nothing.
    """
    worst = min(errors, key=lambda own: own.cosine, default=None)
    if worst is None or least == 0 or worst.cosine >= least:
        return
    node = max(nodes, key=lambda own: own.error, default=None)
    most = f"; the node that is worst by itself is {node.node} (relative error {node.error:.2g})" if node else ""
    raise Verdict(
        f"output {worst.name} is destroyed: its cosine to the float model's is {worst.cosine:.3f}, below --min-cosine "
        f"{least:g} (relative error {worst.relative:.2g}){most}; keep nodes in float (--exclude, --keep-worst) or "
        "give other passes; no output was written"
    )


@phase("run the saved file")
def run_file(
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
    """Every output of a saved model for each batch; `optimize` as in `runtime.session`.

    Caches are told in floats, whatever it stores them in. What it draws at random is what the graph drew that it was
    saved from, see `randomness`.
    floats: nodes that compute in floats here whatever accuracy level the file gives them.
    more: batches whose outputs `each` is given, with their number, instead of being kept; they follow no other.
    """
    settings = {"providers": (provider,), "kernels": "portable", "optimize": optimize}
    running = repeatable(path, edit=lambda proto: _drop_levels(proto, floats), **settings)
    names = [output.name for output in running.get_outputs()]
    results: list[Arrays] = []
    for batch in batches:
        own = plan.coded(batch.feeds)
        feeds = own if batch.follows is None else complete(plan, own, results[batch.follows])
        results.append(dict(zip(names, run(running, names, feeds), strict=True)))
    for number, batch in enumerate(more):
        found = dict(zip(names, run(running, names, plan.coded(batch.feeds)), strict=True))
        each(number, plan.decoded(found))
    return [plan.decoded(outputs) for outputs in results]


def _drop_levels(proto: onnx.ModelProto, names: Collection[str]) -> bool:
    """Have nodes of these names compute in floats; whether there were any."""
    chosen = [node for node in proto.graph.node if node.name in names]
    for node in chosen:
        kept = [attribute for attribute in node.attribute if attribute.name != ACCURACY_LEVEL]
        del node.attribute[:]
        node.attribute.extend(kept)
    return bool(chosen)


def check_reloaded(
    reloaded: Sequence[Arrays], verified: Sequence[Arrays], dtype: ir.DataType, *, rounding: float = 0.0
) -> float:
    """The largest relative error of the reloaded file against the verified graph; UserError above the limit.

    rounding: what quantization changed in the verified graph. Where activations stay floats, both graphs compute the
    same real numbers and differ by rounding errors of floats, which are small beside that. inf where activations are
    rounded to codes: two graphs whose sums differ in their last bits then round some codes apart, and each lies as far
    from the float model as the other, in directions of its own; no bound on their difference holds. Such a file is held
    against the verified graph by `reloaded`, where nothing is rounded, and against the float model by `check_outputs`.
    """
    worst = max((error.relative for error in compare_outputs(reloaded, verified)), default=0.0)
    limit = max(EXACT.get(dtype, 1e-4), rounding)
    if not worst <= limit:
        raise UserError(
            f"the saved file differs from the verified graph by {worst:.1e} (limit {limit:.0e}); nothing was kept"
        )
    return worst
