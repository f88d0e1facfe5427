"""SwiGLU: the two halves of a joined product, of which one gates the other. It reads no weight."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,valid-type,misc,untyped-decorator"

import onnxscript
from onnxscript import opset21 as op

from qcompile.passes.formats.base import OPSET

SWIGLU = "SwiGLU"


@onnxscript.script(OPSET, default_opset=op)
def SwiGLU(x):
    gate, up = op.Split(x, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
