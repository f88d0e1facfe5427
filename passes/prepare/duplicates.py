"""Equal weights become one: what an exporter copied is tied again."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable

import onnx_ir as ir

from qcompile.passes.formats.base import DOMAIN, EMBEDDING
from qcompile.passes.graph import Decide, is_constant
from qcompile.passes.tensors import chunks

_MIN_BYTES = 1024
_SAMPLE = 1 << 16


def merge_duplicates(model: ir.Model, decide: Decide) -> None:
    """Let every use of an initializer over 1 KiB go to the first one of the same type, shape and bytes.

    Bytes are read in two rounds, a sample of each tensor and then only those whose samples agree. What an embedding of
    a compiled file reads is the head's under a name of its own, and stays so (`formats.base.alias`).
    """
    for group in _groups(_candidates(model.graph), _sample):
        for equal in _groups(group, _content):
            first = equal[0]
            for value in equal[1:]:
                ir.convenience.replace_all_uses_with(value, first)
                model.graph.initializers.pop(value.name or "")
                decide(value.name or "", "merged", f"the same values as {first.name}")


def _candidates(graph: ir.Graph) -> list[ir.Value]:
    return [
        value
        for value in graph.initializers.values()
        if is_constant(value)
        and not value.is_graph_output()
        and value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes > _MIN_BYTES
        and not any(use.node.domain == DOMAIN and use.node.op_type.startswith(EMBEDDING) for use in value.uses())
    ]


def _groups(values: Iterable[ir.Value], key: Callable[[ir.TensorProtocol], bytes]) -> list[list[ir.Value]]:
    """The values that share a key, where there are at least two."""
    groups: dict[bytes, list[ir.Value]] = defaultdict(list)
    for value in values:
        if value.const_value is not None:
            groups[key(value.const_value)].append(value)
    return [group for group in groups.values() if len(group) > 1]


def _sample(tensor: ir.TensorProtocol) -> bytes:
    """Type, shape and the first bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(next(chunks(tensor, _SAMPLE)))
    return digest.digest()


def _content(tensor: ir.TensorProtocol) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks(tensor):
        digest.update(chunk)
    return digest.digest()
