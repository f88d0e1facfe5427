"""What changed an operator's meaning between opset 7 and 21, and how an older node says the same today.

A rule rewrites one node in place; it returns True when it changed it, False when there was nothing to do, and a reason
when it cannot. Changes that only add types or optional attributes need no rule.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Names, constant_before, float_type, insert_before, small_array, take_over

Rule = Callable[[ir.Node, Names], bool | str]


def _attribute_to_input(node: ir.Node, names: Names, *, name: str, index: int, dtype: Any = np.int64) -> bool:
    """Case 1: an attribute became an input; integers a vector, and without a dtype a scalar of the data's type."""
    attribute = node.attributes.pop(name, None)
    if attribute is None:
        return False
    array = np.array(attribute.value, dtype or float_type(node).numpy())
    array = np.atleast_1d(array) if dtype is np.int64 else array
    _set_input(node, index, constant_before(node, array, output=names.fresh(f"{node.outputs[0].name}_{name}")))
    return True


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _drop_attributes(node: ir.Node, names: Names, *, attributes: Sequence[str]) -> bool:
    """Case 2: an attribute lost its meaning, at least for inference."""
    return bool([name for name in attributes if node.attributes.pop(name, None) is not None])


def _spatial(node: ir.Node, names: Names) -> bool | str:
    """Case 2 for BatchNormalization: statistics of every pixel are no longer possible."""
    if node.attributes.get_int("spatial", 1) != 1:
        return "its statistics are not those of whole channels"
    return _drop_attributes(node, names, attributes=["spatial"])


def _rename(node: ir.Node, names: Names, *, op_type: str) -> bool:
    """Case 3: the operator got another name."""
    node.op_type = op_type
    return True


def _explicit(node: ir.Node, names: Names, *, attribute: str, value: Any) -> bool:
    """Case 4: the default of an attribute changed."""
    if attribute in node.attributes:
        return False
    node.attributes.add(ir.convenience.convert_attribute(attribute, value))
    return True


def _softmax(node: ir.Node, names: Names) -> bool:
    """Case 5: softmax over all axes from `axis` on became softmax over one axis."""
    axis = node.attributes.get_int("axis", 1)
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    assert axis is not None
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if value.shape is not None and axis % max(len(value.shape), 1) == len(value.shape) - 1:
        return True
    base = output.name
    shape = insert_before(node, "Shape", [value], name=f"{node.name}_shape", output=names.fresh(f"{base}_shape"))
    flat = insert_before(
        node, "Flatten", [value], {"axis": axis}, name=f"{node.name}_flatten", output=names.fresh(f"{base}_flat")
    )
    soft = insert_before(
        node, node.op_type, [flat], {"axis": -1}, name=node.name or "", output=names.fresh(f"{base}_rows")
    )
    node.name = f"{node.name}_replaced"
    back = insert_before(
        node,
        "Reshape",
        [soft, shape],
        {"allowzero": 1},
        name=f"{soft.producer().name}_reshape",  # type: ignore[union-attr]
        output=names.fresh(f"{base}_back"),
    )
    take_over(output, back, names)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _batch_normalization(node: ir.Node, names: Names) -> bool | str:
    """Case 6: statistics as further outputs meant training; in inference nobody uses them."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "it is in training mode"
    node.resize_outputs(1)
    return False


def _upsample(node: ir.Node, names: Names) -> bool:
    """Case 7: Upsample became Resize, with its corners asymmetric and nearest pixels rounded down."""
    node.op_type = "Resize"
    return _resize_10(node, names)


def _resize_10(node: ir.Node, names: Names) -> bool:
    """Case 8: Resize got a region of interest before its scales, and half-pixel coordinates by default."""
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    _explicit(node, names, attribute="coordinate_transformation_mode", value="asymmetric")
    return _explicit(node, names, attribute="nearest_mode", value="floor")


def _resize_13(node: ir.Node, names: Names) -> bool | str:
    """Case 9: one mode of coordinates was dropped; empty scales beside sizes became an absent input."""
    if node.attributes.get_string("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        return "its mode tf_half_pixel_for_nn was removed"
    scales = small_array(node.inputs[2]) if len(node.inputs) == 4 and node.inputs[3] is not None else None
    if scales is None or scales.size:
        return False
    node.replace_input_with(2, None)
    return True


def _split(node: ir.Node, names: Names) -> bool:
    """Case 10: without sizes, the number of parts is said."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return False
    return _explicit(node, names, attribute="num_outputs", value=len(node.outputs))


def _grid_sample(node: ir.Node, names: Names) -> bool:
    """Case 11: two modes got other names."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(node.attributes.get_string("mode", "bilinear") or "")
    if mode is None:
        return False
    node.attributes["mode"] = ir.AttrString("mode", mode)
    return True


def _group_normalization(node: ir.Node, names: Names) -> bool | str:
    """Case 12: scale and bias are given for every channel instead of every group."""
    groups, shape = node.attributes.get_int("num_groups"), node.inputs[0].shape if node.inputs[0] else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if groups is None or not isinstance(channels, int):
        return "its number of channels is not known"
    repeats = np.array([1, channels // groups], np.int64)
    for index in (1, 2):
        value, base = node.inputs[index], f"{node.outputs[0].name}_{('', 'scale', 'bias')[index]}"
        for step, operand in (
            ("Unsqueeze", np.array([1], np.int64)),
            ("Expand", repeats),
            ("Reshape", np.array([-1], np.int64)),
        ):
            constant = constant_before(node, operand, output=names.fresh(f"{base}_{step}_by"))
            name = names.fresh(f"{base}_{step}")
            value = insert_before(node, step, [value, constant], name=name, output=name)
        node.replace_input_with(index, value)
    return True


def _dft(node: ir.Node, names: Names) -> bool:
    """Case 13: the axis became an input with another default."""
    _explicit(node, names, attribute="axis", value=1)
    attribute = node.attributes.pop("axis")
    axis = np.array(attribute.as_int(), np.int64)
    _set_input(node, 2, constant_before(node, axis, output=names.fresh(f"{node.outputs[0].name}_axis")))
    return True


def _scan(node: ir.Node, names: Names) -> str:
    """Case 14: Scan lost its batch axis and its input of lengths."""
    return "it scans batches"


_AXES = partial(_attribute_to_input, name="axes", index=1)
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# By operator: (the opset that changed it, the rule), in order.
RULES: dict[str, Sequence[tuple[int, Rule]]] = {
    "BatchNormalization": ((9, _spatial), (14, _batch_normalization)),
    "Clip": (
        (11, partial(_attribute_to_input, name="min", index=1, dtype=None)),
        (11, partial(_attribute_to_input, name="max", index=2, dtype=None)),
    ),
    "DFT": ((20, _dft),),
    "Dropout": ((12, partial(_drop_attributes, attributes=["ratio"])),),
    "GridSample": ((20, _grid_sample),),
    "GroupNormalization": ((21, _group_normalization),),
    "Hardmax": ((13, _softmax),),
    "LogSoftmax": ((13, _softmax),),
    "Pad": (
        (11, partial(_attribute_to_input, name="pads", index=1)),
        (11, partial(_attribute_to_input, name="value", index=2, dtype=None)),
    ),
    "ReduceSum": ((13, _AXES),),
    "Resize": ((11, _resize_10), (13, _resize_13)),
    "RoiAlign": ((16, partial(_explicit, attribute="coordinate_transformation_mode", value="output_half_pixel")),),
    "Scan": ((9, _scan),),
    "Scatter": ((11, partial(_rename, op_type="ScatterElements")),),
    "Slice": tuple(
        (10, partial(_attribute_to_input, name=name, index=index))
        for index, name in ((1, "starts"), (2, "ends"), (3, "axes"))
    ),
    "Softmax": ((13, _softmax),),
    "Split": ((13, partial(_attribute_to_input, name="split", index=1)), (18, _split)),
    "Squeeze": ((13, _AXES),),
    "TopK": ((10, partial(_attribute_to_input, name="k", index=1)),),
    "Unsqueeze": ((13, _AXES),),
    "Upsample": (
        (9, partial(_attribute_to_input, name="scales", index=1, dtype=np.float32)),
        (10, _upsample),
    ),
}
RULES.update({f"Reduce{name}": ((18, _AXES),) for name in _REDUCTIONS})
