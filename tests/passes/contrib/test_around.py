"""passes/contrib/around.py: how many heads there are, where no shape says it."""

import onnx_ir as ir
import pytest

from qcompile.passes.contrib.around import heads_of

_BODY = "a = Reshape(x, cut) q = {} (a)"


@pytest.mark.parametrize(
    ("behind", "width", "heads"),
    [
        ("Transpose <perm = [0, 2, 1, 3]>", 16, 4),
        ("Transpose <perm = [0, 2, 1, 3]>", 24, None),  # 64 are no heads of 24
        ("Transpose <perm = [0, 2, 1, 3]>", None, None),
        ("Transpose <perm = [0, 1, 3, 2]>", 16, None),
        ("Relu", 16, None),
    ],
)
def test_heads_are_counted_by_what_is_cut_into_them(behind: str, width: int | None, heads: int | None) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[b, s, 64] x, int64[4] cut) => (float[b, h, s, w] q)
        {{ {_BODY.format(behind)} }}"""
    q = ir.from_onnx_text(text).graph.outputs[0]
    assert heads_of(q, width) == heads
    q.shape = ir.Shape(["b", 7, "s", 16])
    assert heads_of(q, width) == 7
