"""A cached decoder's inputs: which is which, and arrays for them at sizes of one's choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.contrib.probing import Array
from qcompile.passes.prepare.sizes import named_sizes


@dataclass(frozen=True)
class Inputs:
    """Of a cached decoder, by what Hugging Face calls them.

    tokens: ids (batch, rows) or embeddings (batch, rows, width). pasts: caches (batch, heads, past, width).
    mask: (batch, past + rows), zero for padding. positions: (batch, rows).
    """

    tokens: Sequence[ir.Value]
    pasts: Sequence[ir.Value]
    mask: ir.Value | None
    positions: ir.Value | None

    @classmethod
    def of(cls, graph: ir.Graph) -> "Inputs | str":
        """Those of a graph, or why they cannot be told."""
        tokens, pasts = [], []
        named: dict[str, ir.Value] = {}
        for value in graph.inputs:
            rank, name = len(value.shape or ()), str(value.name)
            kind = next((kind for kind in ("mask", "position") if kind in name), "")
            if rank == 4 and not kind:
                pasts.append(value)
            elif rank == 2 and kind and kind not in named:
                named[kind] = value
            elif rank in (2, 3) and not kind:
                tokens.append(value)
            else:
                return f"input {name} is neither tokens, nor a cache, a mask or positions"
        if not pasts or not tokens:
            return "it has no caches" if tokens else "it has no input of tokens"
        return cls(tokens, pasts, named.get("mask"), named.get("position"))

    @staticmethod
    def cached(graph: ir.Graph) -> bool:
        """Whether a graph has an input like a cache, (batch, heads, past, width)."""
        return any(len(value.shape or ()) == 4 and "past" in str(value.name) for value in graph.inputs)

    def at(self, batch: int, rows: int, past: int, padded: Array | None = None) -> Mapping[ir.Value, Array]:
        """Arrays for all: so many rows behind so many cached ones; padded (batch, past + rows), False for padding."""
        feeds = {value: filled(value, [batch, rows], 1) for value in self.tokens}
        for value in self.pasts:
            feeds[value] = filled(value, [batch, None, past, None], 0)
        if self.mask is not None:
            seen = np.ones((batch, past + rows), bool) if padded is None else padded
            feeds[self.mask] = seen.astype(_numpy(self.mask))
        if self.positions is not None:
            own = np.broadcast_to(np.arange(past, past + rows), (batch, rows))
            feeds[self.positions] = own.astype(_numpy(self.positions))
        return feeds


def filled(value: ir.Value, sizes: Sequence[int | None], number: int) -> Array:
    """An array of one number; sizes that are not given are the value's own."""
    own = [size if isinstance(size, int) else 1 for size in named_sizes(value)]
    given = [*sizes, *[None] * (len(own) - len(sizes))]
    shape = [mine if size is None else size for size, mine in zip(given, own, strict=True)]
    return np.broadcast_to(np.array(number, _numpy(value)), shape)


def _numpy(value: ir.Value) -> np.dtype[Any]:
    return np.dtype((value.dtype or ir.DataType.INT64).numpy())
