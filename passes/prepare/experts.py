"""Products with one matrix for each expert (E, K, N): as E products, each with a matrix of its own."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, insert_before, take_over
from qcompile.passes.linears import constant, dimensions, is_float_constant
from qcompile.passes.tensors import lazy

# Elements of an expert's matrix from which a node of its own is worth it.
_LEAST = 1024


def split_experts(model: ir.Model, decide: Decide) -> int:
    """Y = X W with a constant W of rank 3 and more becomes one MatMul for each matrix of W, and a Concat.

    Runtimes have kernels for integer weights of rank 2 only, and experts see different activations: what is measured
    of one says nothing of another.

    Case 1: X has no axis for the experts, or one of size 1: every product reads X.
    Case 2: that axis has the size E: X is split along it. Of unknown size, it is expanded to E first.
    Case 3: W has several batch axes, or its matrices are small: left as it is (`inner` codes it as a whole).
    W may also stand on the left. The parts are called `<name>.<e>`. Returns how many Y there were.
    """
    names, matrices, changed = Names(model), dict[ir.Value, list[ir.Value]](), 0
    for node in list(model.graph.all_nodes()):
        if node.op_type != "MatMul" or node.domain != "" or len(node.inputs) != 2:
            continue
        slot = 1 if is_float_constant(node.inputs[1]) else 0
        weight, x = node.inputs[slot], node.inputs[1 - slot]
        if not is_float_constant(weight) or weight is None or x is None or x.const_value is not None:
            continue
        axis = _experts_axis(weight)
        if axis is not None and x.shape is not None and len(x.shape) > 1:
            count = _split(model, node, slot, axis, names, matrices)
            decide(node.name or "", "split", f"{count} matrices of {weight.name} as {count} products")
            changed += 1
    return changed


def _experts_axis(weight: ir.Value) -> int | None:
    """The batch axis of W that holds the matrices, from the end; None where it is none of Cases 1 and 2."""
    shape = dimensions(weight)
    wide = [axis - len(shape) for axis, size in enumerate(shape[:-2]) if size != 1]
    return wide[0] if len(wide) == 1 and shape[wide[0]] > 1 and np.prod(shape[-2:]) >= _LEAST else None


def _split(
    model: ir.Model, node: ir.Node, slot: int, axis: int, names: Names, known: dict[ir.Value, list[ir.Value]]
) -> int:
    weight, x, output = node.inputs[slot], node.inputs[1 - slot], node.outputs[0]
    assert weight is not None
    assert x is not None
    assert x.shape is not None
    if weight not in known:
        known[weight] = _matrices(model, weight, axis, names)
    matrices, name = known[weight], node.name or ""
    count, rank, wide = len(matrices), len(x.shape), max(len(x.shape), len(dimensions(weight)))
    parts = _parts(model, node, x, axis, count, names)
    products: list[ir.Value] = []
    for e, own in enumerate(matrices):
        operands = [own, parts[e]] if slot == 0 else [parts[e], own]
        y = _insert(node, "MatMul", operands, f"{name}.{e}", names)
        if wide > rank:  # W has axes that X lacks
            y = _insert(node, "Unsqueeze", [y, _constant(model, range(wide - rank), names)], f"{name}.{e}.rank", names)
        products.append(y)
    whole = _insert(node, "Concat", products, f"{name}.experts", names, axis=wide + axis)
    take_over(output, whole, names)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return count


def _matrices(model: ir.Model, weight: ir.Value, axis: int, names: Names) -> list[ir.Value]:
    """The matrices of W as initializers of their own, read from W's bytes when they are needed."""
    shape, tensor = dimensions(weight), constant(weight)

    def matrix(e: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(array.reshape(shape[axis], *shape[-2:])[e])

    return [
        add_initializer(
            model.graph, names.fresh(f"{weight.name}.{e}"), lazy(tensor, partial(matrix, e), shape=shape[-2:])
        )
        for e in range(shape[axis])
    ]


def _parts(model: ir.Model, node: ir.Node, x: ir.Value, axis: int, count: int, names: Names) -> list[ir.Value]:
    """What each product reads of X."""
    assert x.shape is not None
    rank, name = len(x.shape), node.name or ""
    if rank + axis < 0 or x.shape[axis] == 1:  # Case 1
        return [x] * count
    if x.shape[axis] != count:  # Case 2
        sizes = [count if i == rank + axis else 1 for i in range(rank)]
        x = _insert(node, "Expand", [x, _constant(model, sizes, names)], f"{name}.all", names)
    split = ir.node("Split", [x], {"axis": rank + axis, "num_outputs": count}, num_outputs=count, name=f"{name}.parts")
    for e, value in enumerate(split.outputs):
        value.name, value.type = names.fresh(f"{name}.{e}.input"), x.type
    assert node.graph is not None
    node.graph.insert_before(node, split)
    return list(split.outputs)


def _insert(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value], name: str, names: Names, **attributes: int
) -> ir.Value:
    value = insert_before(node, op_type, inputs, dict(attributes), name=name, output=names.fresh(f"{name}.output"))
    value.type = node.outputs[0].type
    return value


def _constant(model: ir.Model, numbers: range | list[int], names: Names) -> ir.Value:
    array = np.array(list(numbers), np.int64)
    return add_initializer(model.graph, names.fresh("experts.sizes"), ir.tensor(array))
