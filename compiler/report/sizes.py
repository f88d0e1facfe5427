"""Sizes of a model: its constants by type, its parameters, its files; storage that is shared is counted once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.files.load import load_model
from qcompile.compiler.report.stored_weights import KINDS, Weight, all_weights
from qcompile.passes.formats.half_scales import stored_as

Storage = tuple[str, int] | int


@dataclass(frozen=True)
class TypeShare:
    """Constants of one element type: how many tensors and elements, and their bytes; shared storage counted once."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of the model's files, its parameters, stored bits per weight of its linears (None without any)."""

    file_bytes: int
    parameters: int
    linear_bits: float | None


def model_sizes(path: Path) -> Sizes:
    """The sizes of a model file."""
    model = load_model(path)
    weights, constants = all_weights(model), list(all_constants(model))
    return Sizes(file_bytes(path, constants), parameter_count(weights, constants), linear_bits(weights))


def file_bytes(path: Path, constants: list[tuple[str, ir.TensorProtocol]]) -> int:
    """Size of the model file and of every external data file it refers to."""
    folder = path.parent
    files = {folder / str(t.location) for _, t in constants if isinstance(t, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in {path, *files})


def storage(tensor: ir.TensorProtocol) -> Storage:
    """Where a tensor's bytes lie: equal for tensors that share them."""
    tensor = stored_as(tensor)[0]
    if isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None:
        return str(tensor.location), tensor.offset
    return id(tensor)


def all_constants(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Name and tensor of every initializer and Constant node, subgraphs included."""
    graphs = [model.graph, *(g for g in model.graph.subgraphs() if g is not model.graph)]
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield from ((value.name or "", tensor) for tensor in stored_as(value.const_value))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and "value" in node.attributes:
            yield node.outputs[0].name or "", node.attributes["value"].as_tensor()


def type_shares(constants: list[tuple[str, ir.TensorProtocol]]) -> list[TypeShare]:
    """The constants by element type, the largest share first."""
    shares: dict[str, list[int]] = {}
    seen: set[Storage] = set()
    for _, tensor in constants:
        if storage(tensor) not in seen:
            seen.add(storage(tensor))
            share = shares.setdefault(tensor.dtype.name.lower(), [0, 0, 0])
            share[:] = [share[0] + 1, share[1] + tensor.size, share[2] + tensor.nbytes]
    ordered = sorted(shares.items(), key=lambda item: -item[1][2])
    return [TypeShare(dtype, *share) for dtype, share in ordered]


def parameter_count(weights: list[Weight], constants: list[tuple[str, ir.TensorProtocol]]) -> int:
    """Weights and other floats; shared storage once, scales and zero points not at all."""
    seen: set[Storage] = set()
    total = 0
    for weight in weights:
        if weight.tensors and storage(weight.tensors[0]) not in seen:
            total += weight.size
        seen.update(storage(tensor) for tensor in weight.tensors)
    for _, tensor in constants:
        if tensor.dtype.is_floating_point() and storage(tensor) not in seen:
            seen.add(storage(tensor))
            total += tensor.size
    return total


def linear_bits(weights: list[Weight]) -> float | None:
    """Stored bits per weight of the linears, scales and zero points included; None without linears."""
    return _bits(weights, ("linear",))


def family_bits(weights: list[Weight]) -> dict[str, float]:
    """The same of each family of weights that the model has: what is multiplied, convolved, and looked up."""
    found = {family: _bits(weights, kinds) for family, kinds in KINDS.items()}
    return {family: bits for family, bits in found.items() if bits is not None}


def _bits(weights: list[Weight], kinds: tuple[str, ...]) -> float | None:
    own = [weight for weight in weights if weight.kind in kinds and weight.tensors]
    tensors = {storage(part): part.nbytes for w in own for tensor in w.tensors for part in stored_as(tensor)}
    sizes = {storage(weight.tensors[0]): weight.size for weight in own}
    elements = sum(sizes.values())
    return 8 * sum(tensors.values()) / elements if elements else None
