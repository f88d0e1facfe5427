"""Weight formats: for each the ONNX functions that are its specification, and how it is put into a graph.

A format is one file and one row of `FORMATS`; nothing else names it.
"""

import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.errors import UserError
from qcompile.passes.formats.base import DOMAIN, Format
from qcompile.passes.formats.integers import Int4, Int8
from qcompile.passes.formats.mxfp4 import MXFP4
from qcompile.passes.formats.nf4 import NF4

FORMATS: tuple[Format, ...] = (Int4(), Int8(), NF4(), MXFP4())
_BY_NAME = {own.name: own for own in FORMATS}
# The format of every operator of its own and of those of com.microsoft that are made of its products alone.
FORMAT_OF = {name: own for own in FORMATS for name in (*own.operators, *own.foreign)}


def named(name: str) -> Format:
    """The format that a recipe or a decision names."""
    if name not in _BY_NAME:
        raise UserError(f"unknown weight format {name!r}; the formats are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def format_of(node: ir.Node) -> Format | None:
    """The format of the weight that a node of domain qcompile reads; None for any other node."""
    return FORMAT_OF.get(node.op_type) if node.domain == DOMAIN else None


def operator(kind: str, spec: Grid) -> str:
    """The operator of a kind (PRODUCT, BIASED, EMBEDDING, LOOKUP) that reads codes of a grid."""
    own = named(spec.format)
    return f"{kind}{own.word(spec)}"
