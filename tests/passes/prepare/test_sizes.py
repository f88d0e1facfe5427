"""passes/prepare/sizes.py: what a computed shape holds."""

import onnx_ir as ir
import pytest

from qcompile.passes.prepare.sizes import sizes


@pytest.mark.parametrize(("shape", "told"), [([3], (5, 6, 8)), ([2, 3], None), (None, None)])
def test_a_shape_is_one_of_known_rank(shape: list[int] | None, told: tuple[int, ...] | None) -> None:
    """What has two axes, or nobody knows how many, is no list of sizes."""
    body = "s = Shape(x) k = Constant <value_ints = [8]> () c = Concat <axis = 0> (s, k) y = Reshape(x, c)"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> g (float[5, 6] x) => (float y) {{ {body} }}')
    shapes, _, joined, _ = model.graph
    shapes.outputs[0].shape, joined.outputs[0].shape = ir.Shape([2]), None if shape is None else ir.Shape(shape)
    for node in model.graph:
        if node.op_type == "Constant":
            node.outputs[0].const_value = ir.tensor([8])
    assert sizes(joined.outputs[0]) == told
