"""What the data says of the names that a graph gives the sizes of its inputs."""

from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch


def drop_contradicted(model: ir.Model, batches: Sequence[Batch]) -> str:
    """Take away names that one batch has two sizes for, everywhere; what was done, or "".

    Exporters call the number of texts and that of images "batch". ONNX Runtime believes it, and puts a result of the
    one size where it had one of the other.
    """
    named = {str(value.name): [_name(size) for size in value.shape or ()] for value in model.graph.inputs}
    uses = Counter(name for names in named.values() for name in names if name)
    if not any(count > 1 for count in uses.values()):
        return ""
    wrong = sorted({name for batch in batches for name in _contradicted(named, batch)})
    for value in _values(model) if wrong else ():
        if value.shape is not None and any(_name(size) in wrong for size in value.shape):
            value.shape = ir.Shape([None if _name(size) in wrong else size for size in value.shape])
    told = ", ".join(map(repr, wrong))
    return f"sizes of inputs that are all called {told} differ: the name is dropped" if wrong else ""


def _contradicted(named: dict[str, list[str | None]], batch: Batch) -> Iterator[str]:
    sizes: dict[str, int] = {}
    feeds = batch.feeds
    for value, names in named.items():
        shape = feeds[value].shape if value in feeds else ()
        for name, size in zip(names, shape, strict=False):
            if name and sizes.setdefault(name, size) != size:
                yield name


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _name(size: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(size, int) else size.value or None
