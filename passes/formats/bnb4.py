"""Tables of 16 levels that bitsandbytes stores (Dettmers et al. 2023), in groups that are scaled by max |w|.

The portable body has the levels times 127, rounded to int8, so that ONNX Runtime fuses it (formats/tables.py). For the
target matmulnbits they stay as they are, and so are what com.microsoft's MatMulBnb4 decodes, bit for bit.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Grid
from qcompile.passes.formats.base import (
    EMBEDDING,
    Cache,
    Stored,
    become,
    drop_unused,
    operands,
    role,
    unpacked,
)
from qcompile.passes.formats.integers import checked
from qcompile.passes.formats.tables import TableGrid, Tables
from qcompile.passes.graph import MICROSOFT, add_initializer, insert_before
from qcompile.passes.linears import constant, dimensions, stored
from qcompile.passes.spec import granularity


class Bnb4(Tables):
    """Levels of a table between -1 and 1, max |w| of each group as its scale.

    exact: the table, as ONNX Runtime's MatMulBnb4 has it. quant_type: what its attribute of this name is for it.
    """

    exact: ClassVar[tuple[float, ...]]
    quant_type: ClassVar[int]

    @property
    def whole(self) -> tuple[float, ...]:
        """Times 127, rounded."""
        return tuple(float(round(127 * level)) for level in self.exact)

    def grid(self, target: str, *, group: int = 64) -> TableGrid:
        """group: rows that share a scale, 0 for all."""
        return TableGrid(self.name, self.exact if target == "matmulnbits" else self.whole, granularity(checked(group)))

    def word(self, spec: Grid) -> str:
        return self.words[isinstance(spec, TableGrid) and spec.table == self.exact]

    def table(self, word: str) -> Sequence[float]:
        return self.exact if word == self.words[1] else self.whole

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        """MatMulBnb4 cuts all of (N, K) into blocks: one must not reach into the next column."""
        size = spec.group_size(k)
        if target != "matmulnbits" or (16 <= size <= 256 and not size & (size - 1) and not k % size):
            return ""
        return (
            f"target matmulnbits takes {self.name} in groups of 16, 32, 64, 128 or 256 rows that divide K, got {size} "
            f"of {k}: choose another group, or target qcompile or qdq"
        )

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """MatMulBnb4 for products, and an Add for their bias; there is no lookup of such tables."""
        if role(node.op_type) == EMBEDDING:
            return
        own, block_size = operands(node), node.attributes["block_size"].as_int()
        k, n = dimensions(own.codes)
        key = (own.codes, self.name)
        if key not in cache:
            flat = np.ascontiguousarray(unpacked(own.codes, n).astype(np.uint8).T).reshape(-1)
            scale = np.ascontiguousarray(constant(own.scale).numpy().T).reshape(-1)
            packed = np.asarray(flat[::2] << 4 | flat[1::2], np.uint8)
            made = ((own.codes, packed), (own.scale, scale))
            cache[key] = [add_initializer(model.graph, f"{v.name}.bnb4", ir.Tensor(array)) for v, array in made]
        inputs: list[ir.Value | None] = [node.inputs[0], *cache[key]]
        attributes = {"K": k, "N": n, "block_size": block_size, "quant_type": self.quant_type}
        if own.bias is None:
            become(node, "MatMulBnb4", inputs, attributes, domain=MICROSOFT)
        else:
            name, like = f"{node.name}.product", node.outputs[0]
            product = insert_before(node, "MatMulBnb4", inputs, attributes, name=name, output=name, domain=MICROSOFT)
            product.type, product.shape = like.type, like.shape
            become(node, "Add", [product, own.bias], {}, domain="")
        for value in own.values():
            drop_unused(model, value)

    def read(self, node: ir.Node) -> Stored | None:
        if node.op_type not in self.foreign:
            return super().read(node)
        k, n = (node.attributes.get_int(name, 0) for name in ("K", "N"))
        kind, block_size = (node.attributes.get_int(name, 0) for name in ("quant_type", "block_size"))
        form = f"{next(own.name for own in Bnb4.__subclasses__() if own.quant_type == kind)} g{block_size}"
        given = [value for value in node.inputs[1:3] if value is not None and stored(value) is not None]
        return Stored((k, n), form, given) if len(given) == 2 else None
