"""Gemm with a constant weight as MatMul and Add, the only form the quantizers know."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, float_type, insert_before, is_constant, take_over
from qcompile.passes.tensors import lazy

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}

# Weights turned round, by weight and the graph that reads them: None for an initializer, which every graph can read.
_Done = dict[tuple[ir.Value, ir.Graph | None], ir.Value]


def split_gemms(model: ir.Model, decide: Decide) -> None:
    """Y = alpha A' B' + beta C becomes Add(MatMul(A', W), C'), in bodies of If, Loop and Scan too.

    Case 1: transA puts a Transpose before the MatMul.
    Case 2: transB is folded into a weight that only such Gemms use; a weight used otherwise too gets a Transpose node.
    Case 3: alpha is folded into a weight that nothing else uses, and is a Mul behind the MatMul otherwise.
    Case 4: beta is folded into a constant C, and is a Mul on a computed one. beta = 0 or no C leaves out the Add.
    The MatMul keeps the Gemm's name, the Add is called `<name>_bias`.
    """
    names = Names(model)
    transposed: _Done = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Gemm" or node.domain != "":
            continue
        reason = _reason(node)
        if reason is None:
            decide(node.name or "", "split", _split(node, names, transposed, model.graph))
        else:
            decide(node.name or "", "skipped", reason)


def _reason(node: ir.Node) -> str | None:
    weight = _origin(node.inputs[1])
    if not _is_known(weight):
        weight = node.inputs[0]  # on the left: `turn_products` goes on from there
    if weight is None or not _is_known(weight) or weight.const_value is None:
        return "no operand of the Gemm is a constant"
    if weight.const_value.dtype not in _FLOATS:
        return f"the Gemm is of type {weight.const_value.dtype.name}"
    return None


def _is_known(value: ir.Value | None) -> bool:
    return is_constant(value) and value is not None and value.const_value is not None


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What a kept Transpose transposes, or the value itself."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


def _split(node: ir.Node, names: Names, transposed: _Done, home: ir.Graph) -> str:
    left, right = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    assert right is not None
    assert alpha is not None
    assert beta is not None
    name, output, steps = node.name or "", node.outputs[0], ["MatMul"]
    if node.attributes.get_int("transA", 0):  # Case 1
        left = _insert(node, "Transpose", [left], f"{name}_input_transposed", names, perm=[1, 0])
        steps.insert(0, "Transpose")
    single = len(right.uses()) == 1
    if node.attributes.get_int("transB", 0):  # Case 2
        if _is_known(_origin(right)):
            right = _transposed(node, right, transposed, names, home)
        else:
            right = _insert(node, "Transpose", [right], f"{name}_right_transposed", names, perm=[1, 0])
    if alpha != 1 and single and len(right.uses()) < 2 and is_constant(right):  # Case 3
        right, alpha = _scaled(home, right, alpha, names), 1.0
    result = _insert(node, "MatMul", [left, right], name, names)
    node.name = f"{name}_replaced"
    if alpha != 1:
        result = _insert(node, "Mul", [result, _scalar(node, alpha, names, home)], f"{name}_alpha", names)
        steps.append("Mul")
    if bias is not None and beta != 0:  # Case 4
        if beta != 1 and is_constant(bias):
            bias = _scaled(home, bias, beta, names)
        elif beta != 1:
            bias = _insert(node, "Mul", [bias, _scalar(node, beta, names, home)], f"{name}_beta", names)
            steps.append("Mul")
        result = _insert(node, "Add", [result, bias], f"{name}_bias", names)
        steps.append("Add")
    take_over(output, result, names)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return "Gemm as " + ", ".join(steps)


def _insert(
    node: ir.Node, op_type: str, inputs: list[ir.Value | None], name: str, names: Names, **attributes: list[int]
) -> ir.Value:
    value = insert_before(node, op_type, inputs, dict(attributes), name=name, output=names.fresh(f"{name}_output"))
    value.type = node.outputs[0].type
    if op_type in ("MatMul", "Add"):
        value.shape = node.outputs[0].shape
    elif op_type == "Transpose" and inputs[0] is not None and inputs[0].shape is not None:
        value.shape = ir.Shape(list(inputs[0].shape)[::-1])
    return value


def _transposed(node: ir.Node, weight: ir.Value, done: _Done, names: Names, home: ir.Graph) -> ir.Value:
    """Case 2: the weight the other way round; a new initializer, a Transpose's own input, or a new Transpose."""
    for key in ((weight, None), (weight, node.graph)):
        if key in done:
            return done[key]
    if not is_constant(weight):
        origin = _origin(weight)
        assert origin is not None
        return origin
    if not weight.is_graph_output() and all(_is_transposing_gemm(user, index) for user, index in weight.uses()):
        tensor = weight.const_value
        assert tensor is not None
        n, k = tensor.shape.numpy()
        flipped = lazy(tensor, lambda array: array.T, shape=(k, n))
        done[weight, None] = made = add_initializer(home, names.fresh(f"{weight.name}_transposed"), flipped)
        return made
    made = _insert(node, "Transpose", [weight], names.fresh(f"{weight.name}_transpose"), names, perm=[1, 0])
    done[weight, node.graph] = made
    return made


def _is_transposing_gemm(node: ir.Node, index: int) -> bool:
    return (node.op_type, index) == ("Gemm", 1) and node.attributes.get_int("transB", 0) == 1


def _scaled(home: ir.Graph, value: ir.Value, factor: float, names: Names) -> ir.Value:
    """The constant times the factor, computed in float32 (a double stays one), as a new initializer."""
    tensor = value.const_value
    assert tensor is not None
    dtype = tensor.dtype.numpy()
    wide = np.promote_types(dtype, np.float32) if tensor.dtype != ir.DataType.BFLOAT16 else np.dtype(np.float32)
    shape = tuple(int(size) for size in tensor.shape.numpy())
    product = lazy(tensor, lambda array: (array.astype(wide) * wide.type(factor)).astype(dtype), shape=shape)
    return add_initializer(home, names.fresh(f"{value.name}_scaled"), product)


def _scalar(node: ir.Node, factor: float, names: Names, home: ir.Graph) -> ir.Value:
    dtype = float_type(node)
    tensor = ir.tensor(np.array(factor, dtype.numpy()), dtype=dtype)
    return add_initializer(home, names.fresh(f"{node.outputs[0].name}_factor"), tensor)
