"""passes/formats/base.py: what packed products read."""

import onnx_ir as ir
import pytest

from qcompile.passes.formats.base import DOMAIN, operands


@pytest.mark.parametrize("missing", [1, 2])
def test_a_packed_product_has_codes_and_scales(missing: int) -> None:
    inputs: list[ir.Value | None] = [ir.val("x"), ir.val("codes"), ir.val("scale")]
    assert operands(ir.node("MatMulInt4", inputs, domain=DOMAIN)).values() == inputs[1:]
    inputs[missing] = None
    with pytest.raises(TypeError, match="node product: MatMulInt4 without codes or scales"):
        operands(ir.node("MatMulInt4", inputs, domain=DOMAIN, name="product"))
