"""A cached decoder's inputs: which is which, and arrays for them at sizes of one's choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.caches import is_cache
from qcompile.passes.contrib.probing import Array
from qcompile.passes.prepare.sizes import named_sizes

_LATER = 3  # positions
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
# Of what stands beside the tokens: an encoder's states and mask, images.
_ELSEWHERE = ("encoder", "cross", "image", "pixel", "vision", "audio")


@dataclass(frozen=True)
class Inputs:
    """Of a cached decoder, told by types and edges, and where these leave a choice by what Hugging Face calls them.

    tokens: ids (batch, rows), else embeddings (batch, rows, width). pasts: caches (batch, heads, past, width) to which
    keys and values are appended. mask: (batch, past + rows), zero for padding. positions: (batch, rows).
    mask and positions: None where no node reads them: what is fed then says nothing, and may have any sizes.
    What else there is (an encoder's states, adapters, switches) belongs to none, and is not known of anything it makes.
    """

    tokens: Sequence[ir.Value]
    pasts: Sequence[ir.Value]
    mask: ir.Value | None
    positions: ir.Value | None

    @classmethod
    def of(cls, graph: ir.Graph) -> "Inputs | str":
        """Those of a graph, or why they cannot be told."""
        own = [value for value in graph.inputs if not any(word in str(value.name) for word in _ELSEWHERE)]
        masks, positions = ([value for value in own if kind in str(value.name)] for kind in ("mask", "position"))
        for value in (*masks, *positions):
            if value.uses() and len(value.shape or ()) != 2:
                return f"input {value.name} is no mask (batch, positions) and no positions (batch, rows)"
        if len(masks) > 1 or len(positions) > 1:
            return f"of {' and '.join(str(value.name) for value in (masks, positions)[len(masks) < 2])} it takes one"
        others = [value for value in own if value not in (*masks, *positions)]
        ids = [value for value in others if len(value.shape or ()) == 2 and value.dtype in _INTEGERS]
        embedded = [value for value in others if len(value.shape or ()) == 3 and value.dtype not in _INTEGERS]
        tokens = sorted(ids, key=lambda value: "decoder" not in str(value.name)) or embedded
        pasts = [value for value in graph.inputs if is_cache(value)]
        if not pasts or not tokens:
            return "keys and values are appended to none of its inputs" if tokens else "it has no input of tokens"
        return cls(tokens, pasts, *(next((v for v in found if v.uses()), None) for found in (masks, positions)))

    def at(
        self, batch: int, rows: int, past: int, padded: Array | None = None, *, other: bool = False
    ) -> Mapping[ir.Value, Array]:
        """Arrays for all: so many rows behind so many cached ones; padded (batch, past + rows), False for padding.

        other: other tokens than otherwise, and positions that begin later.
        """
        feeds = {value: filled(value, [batch, rows], int(not other)) for value in self.tokens}
        for value in self.pasts:
            feeds[value] = filled(value, [batch, None, past, None], 0)
        if self.mask is not None:
            seen = np.ones((batch, past + rows), bool) if padded is None else padded
            feeds[self.mask] = seen.astype(_numpy(self.mask))
        if self.positions is not None:
            own = np.broadcast_to(np.arange(past, past + rows) + _LATER * other, (batch, rows))
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
