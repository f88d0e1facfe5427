"""What counts as a cache, and as a decoder with caches."""

import onnx_ir as ir
import pytest

from qcompile.passes.caches import has_caches, is_cache

_APPENDED = "y = Concat <axis = {axis}> ({first}, {second})"


def _model(body: str, inputs: str, output: str = "float[B,2,T,8] y") -> ir.Model:
    domains = '"": 23, "com.microsoft": 1'
    return ir.from_onnx_text(f"<ir_version: 10, opset_import: [{domains}]> g ({inputs}) => ({output}) {{ {body} }}")


@pytest.mark.parametrize(
    ("body", "inputs", "cache", "decoder"),
    [
        (_APPENDED.format(axis=2, first="c", second="n"), "float[B,2,P,8] c, float[B,2,S,8] n", True, True),
        (_APPENDED.format(axis=-2, first="c", second="n"), "float[B,2,P,8] c, float[B,2,S,8] n", True, True),
        (_APPENDED.format(axis=2, first="n", second="c"), "float[B,2,P,8] c, float[B,2,S,8] n", False, True),
        (_APPENDED.format(axis=1, first="c", second="n"), "float[B,2,P,8] c, float[B,3,P,8] n", False, False),
        ("h = Concat <axis = 2> (c, n) y = Relu(h)", "float[B,2,P,8] c, float[B,2,S,8] n", False, False),
        (
            "h, y, z = Attention <q_num_heads = 2, kv_num_heads = 2> (q, q, q, , c, d)",
            "float[B,2,P,8] c, float[B,2,P,8] d, float[B,S,16] q", True, True,
        ),
        (
            "h, y, z = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2> (q, q, q, c, d, e, f)",
            "float[B,2,P,8] c, float[B,2,P,8] d, float[B,S,16] q, int32[B] e, int32 f", True, True,
        ),
    ],
)  # fmt: skip
def test_a_cache_grows_along_its_rows_into_an_output(body: str, inputs: str, *, cache: bool, decoder: bool) -> None:
    model = _model(body, inputs)
    assert is_cache(model.graph.inputs[0]) == cache
    assert has_caches(model.graph) == decoder


def test_caches_of_another_form_are_told_by_their_names() -> None:
    body = "y = Concat <axis = 1> (past_key, n)"
    model = _model(body, "float[B,P,2,8] past_key, float[B,S,2,8] n", "float[B,T,2,8] y")
    assert not is_cache(model.graph.inputs[0])
    assert has_caches(model.graph)
