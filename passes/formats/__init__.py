"""Weight formats: for each the ONNX functions that are its specification, and how it is put into a graph.

A format is one file and one row of `FORMATS`; nothing else names it. Operators of a form that no recipe names, but a
pass writes, or a file is kept in, are a row of `OTHERS`.
"""

import inspect
from collections.abc import Mapping
from functools import cache

import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import Table
from qcompile.passes.formats.base import DOMAIN, Format, Operators, role
from qcompile.passes.formats.bits import Int2, Int3, Int5, Int6
from qcompile.passes.formats.codebook import Pairs2, Pairs2Half, Pairs3, Pairs3Half, Pairs4
from qcompile.passes.formats.fp4 import FP4
from qcompile.passes.formats.integers import Int4, Int8
from qcompile.passes.formats.iq4_nl import IQ4NL
from qcompile.passes.formats.mxfp4 import MXFP4
from qcompile.passes.formats.nf4 import NF4
from qcompile.passes.formats.nvfp4 import NVFP4
from qcompile.passes.formats.static_columns import StaticColumns

FORMATS: tuple[Format, ...] = (
    *(Int4(), Int8(), NF4(), MXFP4(), Int2(), Int3(), Int5(), Int6(), NVFP4(), FP4()),
    *(Pairs2(), Pairs2Half(), Pairs3(), Pairs3Half(), Pairs4()),
)
OTHERS: tuple[Operators, ...] = (StaticColumns(), IQ4NL())
_OPERATORS = {name: own for own in (*FORMATS, *OTHERS) for name in (*own.operators, *own.foreign)}


def _check(own: Format) -> None:
    """Raise ValueError for a format of another package that would be taken for something else."""
    if own.name == "keep":
        raise ValueError("keep is the word for no format")
    if own.native:
        raise ValueError("native must be empty: the kernel library has none of its products")
    taken = [name for name in (*own.operators, *own.foreign) if name in _OPERATORS]
    if taken:
        raise ValueError(f"its operator {taken[0]} is that of {_OPERATORS[taken[0]].name}: choose other words")
    unclear = [name for name, (kind, _) in own.operators.items() if role(name) != kind]
    if unclear:
        raise ValueError(f"its operator {unclear[0]} is read as a {role(unclear[0])}: choose other words")
    if any(p.default is p.empty for p in inspect.signature(own.grid).parameters.values() if p.name != "target"):
        raise ValueError("every parameter of its grid needs a default")
    if own.grid("qcompile").format != own.name:
        raise ValueError(f"its grid says it is of format {own.grid('qcompile').format!r}")


# Those of `FORMATS`, then those of other packages.
BY_NAME: Table[Format] = Table(
    "qcompile.formats", "weight format", Format, FORMATS, make=lambda kind: kind(), check=_check
)


def named(name: str) -> Format:
    """The format that a recipe or a decision names."""
    return BY_NAME.required(name)


def by_operator(op_type: str) -> Operators | None:
    """What an operator of the domain, or one of com.microsoft that is made of such alone, belongs to."""
    if op_type in _OPERATORS:
        return _OPERATORS[op_type]
    found = _operators_outside().get(op_type, [])
    if len(found) > 1:
        told = " and ".join(f"{own.name} of {BY_NAME.origin(own.name)}" for own in found)
        raise UserError(f"operator {op_type} is that of two weight formats, {told}: uninstall one of them")
    return found[0] if found else None


@cache
def _operators_outside() -> Mapping[str, list[Format]]:
    """The operators of formats of other packages."""
    found: dict[str, list[Format]] = {}
    for own in (own for own in BY_NAME.usable() if own not in FORMATS):
        for name in (*own.operators, *own.foreign):
            found.setdefault(name, []).append(own)
    return found


def format_of(node: ir.Node) -> Operators | None:
    """The format of the weight that a node of domain qcompile reads; None for any other node."""
    return by_operator(node.op_type) if node.domain == DOMAIN else None


def operator(kind: str, spec: Grid) -> str:
    """The operator of a kind (PRODUCT, BIASED, EMBEDDING, LOOKUP) that reads codes of a grid."""
    own = named(spec.format)
    return f"{kind}{own.word(spec)}"
