"""What is in a model file: types, sizes, shared weights, what is quantized and what is not."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.compiler.console.numbers import megabytes, percent
from qcompile.compiler.files.load import load_model
from qcompile.compiler.report.sizes import (
    Storage,
    TypeShare,
    all_constants,
    family_bits,
    file_bytes,
    linear_bits,
    parameter_count,
    storage,
    type_shares,
)
from qcompile.compiler.report.stored_weights import Weight, all_weights, shares
from qcompile.compiler.results.sheet import Sheet, Shown

# Smaller constants (shapes, scalars) are shared all the time; that is no tie.
_SMALL = 1024
_SHOWN = 4


@dataclass(frozen=True)
class WeightGroup:
    """Alike weights: nodes whose names differ only in numbers."""

    pattern: str
    count: int
    operator: str
    kind: str
    shape: tuple[int, ...]
    form: str
    quantized: bool
    reason: str


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """What is in a model file; prints as a short table.

    linear_bits: stored bits per weight of the linears, scales and zero points included; None without linears.
    bits: the same by family, of products (MatMul and what multiplies like it), of convolutions and of lookups.
    file_bits: bits of all files per parameter. parameters: weights, not counting scales and zero points.
    shares: how much of the MatMul-like and of the convolutions' weights is quantized, None where there are none.
    ties: names of constants stored once, and names of nodes that share one constant.
    """

    path: str
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: list[str]
    outputs: list[str]
    operators: dict[str, int]
    functions: list[str]
    types: list[TypeShare]
    parameters: int
    file_bytes: int
    linear_bits: float | None
    bits: dict[str, float]
    shares: dict[str, float | None]
    weights: list[WeightGroup]
    ties: list[str]
    metadata: dict[str, Any]

    @property
    def file_bits(self) -> float | None:
        """Bits of all files per parameter."""
        return 8 * self.file_bytes / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"file_bits": self.file_bits}

    def records(self) -> list[dict[str, Any]]:
        """A row for each group of alike weights; for each weight where all were asked for."""
        return [asdict(group) for group in self.weights]

    def sheet(self) -> Sheet:
        """The weights, and what of them is quantized."""
        rows = [
            [group.pattern, str(group.count), group.operator, " x ".join(map(str, group.shape)), group.form]
            for group in self.weights
        ]
        bits = ", ".join(f"{family} {own:.3f}" for family, own in self.bits.items())
        told = ", ".join(
            f"{percent(own)} of the {family} weights" for family, own in self.shares.items() if own is not None
        )
        notes = [f"inputs: {_few(self.inputs)}", f"outputs: {_few(self.outputs)}"]
        notes += [f"bits per weight: {bits}"] if bits else []
        notes += [f"quantized: {told}"] if told else []
        title = f"{self.path}: {megabytes(self.file_bytes)}, {self.parameters:,} parameters"
        return Sheet(title, ("weights", "count", "operator", "shape", "stored as"), rows, 0, notes)


def _few(lines: Sequence[str]) -> str:
    """The first of them: inputs of a model with caches are alike by the dozen."""
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; {more} more" if more > 0 else "")


def inspect(path: Path, *, every: bool = False) -> Summary:
    """The summary of a model file. every: list each weight by itself instead of alike ones together."""
    model = load_model(path)
    weights = all_weights(model)
    constants = list(all_constants(model))
    return Summary(
        path=str(path),
        ir_version=model.ir_version,
        opsets={domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=[described(value) for value in model.graph.inputs if not value.is_initializer()],
        outputs=[described(value) for value in model.graph.outputs],
        operators=operators_of(model),
        functions=[f"{function.domain}.{function.name}" for function in model.functions.values()],
        types=type_shares(constants),
        parameters=parameter_count(weights, constants),
        file_bytes=file_bytes(path, constants),
        linear_bits=linear_bits(weights),
        bits=family_bits(weights),
        shares=shares(weights),
        weights=_groups(weights, every=every),
        ties=[*_shared_storage(constants), *_shared_values(model.graph)],
        metadata={key: _parsed(value) for key, value in model.metadata_props.items()},
    )


def _groups(weights: list[Weight], *, every: bool) -> list[WeightGroup]:
    counted: Counter[WeightGroup] = Counter()
    for w in weights:
        pattern = w.node if every else pattern_of(w.node)
        shape = w.shape
        if w.kind in ("conv", "constant") and not every:  # a vision model has dozens, no two alike
            pattern, shape = w.operator, ()
        counted[WeightGroup(pattern, 1, w.operator, w.kind, shape, w.form, w.quantized, w.reason)] += 1
    return [replace(group, count=count) for group, count in counted.items()]


def pattern_of(node: str) -> str:
    """One name for alike nodes: linear, linear_1 and linear_2 are alike, as are layers.0.up and layers.1.up."""
    return re.sub(r"\d+", "*", re.sub(r"[_.]\d+$", "", node))


def operators_of(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator there are, in all graphs, the most frequent first."""
    nodes = (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type != "Constant")
    return dict(Counter(_operator(node) for node in nodes).most_common())


def _shared_storage(constants: list[tuple[str, ir.TensorProtocol]]) -> Iterator[str]:
    by_place: dict[Storage, list[str]] = {}
    for name, tensor in constants:
        if tensor.nbytes >= _SMALL:
            by_place.setdefault(storage(tensor), []).append(name)
    for names in by_place.values():
        if len(names) > 1:
            yield f"stored once: {', '.join(names)}"


def _shared_values(graph: ir.Graph) -> Iterator[str]:
    for value in graph.initializers.values():
        users = list(dict.fromkeys(use.node.name or use.node.op_type for use in value.uses()))
        if len(users) > 1 and value.const_value is not None and value.const_value.nbytes >= _SMALL:
            shown = ", ".join(users[:4]) + (f" and {len(users) - 4} more" if len(users) > 4 else "")
            yield f"{value.name} is shared by {shown}"


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def described(value: ir.Value) -> str:
    """An input or output with its type and sizes."""
    dims = (
        "?" if value.shape is None else ", ".join(str(d if isinstance(d, int) else d.value or "?") for d in value.shape)
    )
    return f"{value.name}: {value.dtype.name.lower() if value.dtype is not None else '?'} [{dims}]"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
