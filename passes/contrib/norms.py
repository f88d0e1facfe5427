"""Norms by the root mean square, with the sum before them, as ONNX Runtime's fused operators."""

import onnx_ir as ir

from qcompile.passes.graph import MICROSOFT, Decide, Names, is_constant, producer_of, small_array, take_over


def fuse_norms(model: ir.Model, decide: Decide) -> None:
    """gamma x / sqrt(mean(x²) + eps): SimplifiedLayerNormalization; with x = a + b, SkipSimplifiedLayerNormalization.

    Zhang and Sennrich 2019, arXiv:1910.07467. Of a float16 x also where all but gamma is written in float32 between
    Casts, as torch exports it: the operators compute in float32 by themselves, and round once less.
    """
    names = Names(model)
    for node in list(model.graph):
        found = _norm(node) if (node.op_type, node.domain) == ("Mul", "") else None
        if found is None:
            continue
        x, gamma, epsilon = found
        add = x.producer()
        if add is not None and (add.op_type, add.domain) == ("Add", "") and _alike(add) and add.graph is model.graph:
            made = ir.node(
                "SkipSimplifiedLayerNormalization",
                [*add.inputs, gamma],
                {"epsilon": epsilon},
                domain=MICROSOFT,
                num_outputs=4,
                name=node.name,
            )
            add.prepend(made)
            for value in made.outputs[1:3]:
                value.name = ""
            take_over(node.outputs[0], made.outputs[0], names)
            take_over(x, made.outputs[3], names)
            model.graph.opset_imports[MICROSOFT] = 1
        else:
            made = ir.node("SimplifiedLayerNormalization", [x, gamma], {"epsilon": epsilon, "axis": -1}, name=node.name)
            node.prepend(made)
            take_over(node.outputs[0], made.outputs[0], names)
        decide(node.name or "", "fused", made.op_type)


def _alike(add: ir.Node) -> bool:
    a, b = add.inputs
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != 3 or len(b.shape) != 3:
        return False
    return a.shape[2] == b.shape[2] and isinstance(a.shape[2], int) and not is_constant(a) and not is_constant(b)


def _norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """(x, gamma, epsilon) of the last node of a norm."""
    for i in (0, 1):
        gamma, normed = node.inputs[i], node.inputs[1 - i]
        if gamma is None or normed is None or not is_constant(gamma):
            continue
        found = _normed(normed) or _normed_in_float32(normed)
        if found is None or found[0].shape is None or gamma.dtype != found[0].dtype:
            continue
        if list(gamma.shape or ()) == list(found[0].shape)[-1:]:
            return found[0], gamma, found[1]
    return None


def _normed(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(x, epsilon) of x / sqrt(mean(x²) + epsilon), or x times its reciprocal."""
    node = value.producer()
    if node is None or node.op_type not in ("Div", "Mul"):
        return None
    for i in (0, 1) if node.op_type == "Mul" else (0,):
        x, by = node.inputs[i], producer_of(node.inputs[1 - i])
        root = _reciprocal(by) if by is not None and node.op_type == "Mul" else by
        epsilon = _mean_square(root, x) if x is not None else None
        if x is not None and epsilon is not None:
            return x, epsilon
    return None


def _normed_in_float32(value: ir.Value) -> tuple[ir.Value, float] | None:
    """The same of a float16 x that is cast to float32 before, and back behind."""
    back = producer_of(value)
    if back is None or back.op_type != "Cast" or value.dtype != ir.DataType.FLOAT16 or back.inputs[0] is None:
        return None
    found = _normed(back.inputs[0])
    wide = producer_of(found[0]) if found is not None and found[0].dtype == ir.DataType.FLOAT else None
    x = wide.inputs[0] if wide is not None and wide.op_type == "Cast" else None
    return (x, found[1]) if found is not None and x is not None and x.dtype == ir.DataType.FLOAT16 else None


def _reciprocal(node: ir.Node) -> ir.Node | None:
    """What makes y of a node 1 / y."""
    if node.op_type == "Reciprocal":
        return producer_of(node.inputs[0])
    return producer_of(node.inputs[1]) if node.op_type == "Div" and _number(node.inputs[0]) == 1 else None


def _mean_square(root: ir.Node | None, x: ir.Value) -> float | None:
    """epsilon of sqrt(mean(x²) + epsilon)."""
    add = producer_of(root.inputs[0]) if root is not None and root.op_type == "Sqrt" else None
    if add is None or add.op_type != "Add":
        return None
    for i in (0, 1):
        epsilon, mean = _number(add.inputs[i]), producer_of(add.inputs[1 - i])
        if epsilon is not None and mean is not None and _is_mean(mean, len(x.shape or ())):
            square = producer_of(mean.inputs[0])
            if square is not None and _is_square(square, x):
                return epsilon
    return None


def _is_mean(node: ir.Node, rank: int) -> bool:
    axes = small_array(node.inputs[1]) if len(node.inputs) > 1 else None
    last = axes is not None and axes.tolist() in ([-1], [rank - 1])
    return node.op_type == "ReduceMean" and last and node.attributes.get_int("keepdims", 1) == 1


def _is_square(node: ir.Node, x: ir.Value) -> bool:
    if node.op_type == "Pow":
        return node.inputs[0] is x and _number(node.inputs[1]) == 2
    return node.op_type == "Mul" and list(node.inputs) == [x, x]


def _number(value: ir.Value | None) -> float | None:
    array = small_array(value, 1)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
