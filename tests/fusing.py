"""Decoders with their attention fused, and what they compute run by run."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.base import Decision, Region
from qcompile.passes.contrib.attention import FuseAttention
from qcompile.passes.prepare import Prepare
from qcompile.runtime.sessions import session

Array = npt.NDArray[Any]
_VOCABULARY = 256


def fuse_attention(model: ir.Model, **parameters: Any) -> tuple[ir.Model, list[Decision]]:
    """The model with its attention fused, and what was decided."""
    made = model.clone()
    Prepare().call(Region.whole(made))
    own = FuseAttention(**parameters)
    own.call(Region.whole(made))
    return made, own.decisions


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


class Running:
    """A decoder in ONNX Runtime, and the caches of the sequences it has seen."""

    def __init__(self, model: ir.Model, batch: int) -> None:
        self.own = session(ir.to_proto(model).SerializeToString())
        self.caches: dict[str, Array] = {}
        for value in self.own.get_inputs():
            if value.name.startswith("past"):
                kind = np.float16 if "16" in value.type else np.float32
                self.caches[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), kind)

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        taken = {value.name: value.type for value in self.own.get_inputs()}
        mask = mask.astype(np.int32 if "int32" in taken["attention_mask"] else np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.caches}
        names = [value.name for value in self.own.get_outputs()]
        found = dict(zip(names, self.own.run(None, {n: a for n, a in feeds.items() if n in taken}), strict=True))
        self.caches = {name: found[name.replace("past_key_values", "present")] for name in self.caches}
        return np.asarray(found["logits"])


def _positions(mask: Array, *, counted: bool) -> Array:
    """position_ids of all tokens: padding is left out, as transformers does, or counted as well."""
    return np.tile(np.arange(mask.shape[1]), (len(mask), 1)) if counted else np.maximum(np.cumsum(mask, 1) - 1, 0)


def _logits(model: ir.Model, mask: Array, rows: list[int], seed: int, *, counted: bool) -> Array:
    """Of the tokens that are no padding: a prompt, padded as `mask` says, and so many rows behind it, run by run."""
    random, batch = np.random.default_rng(seed), len(mask)
    run = Running(model, batch)
    ids = random.integers(0, _VOCABULARY, mask.shape)
    found = [run(ids, mask, _positions(mask, counted=counted))[mask == 1]]
    for count in rows:
        mask = np.concatenate([mask, np.ones((batch, count), np.int64)], 1)
        ids = random.integers(0, _VOCABULARY, (batch, count))
        positions = _positions(mask, counted=counted)[:, -count:]
        found.append(run(ids, mask, positions).reshape(batch * count, -1))
    return np.concatenate(found)


def check_same(
    model: ir.Model, fused: ir.Model, mask: Array, rows: list[int], *, tolerance: float = 1e-5, counted: bool = False
) -> None:
    """Both give the same logits for tokens that are no padding. counted: position_ids count padding."""
    expected, found = (_logits(own, mask, rows, seed=3, counted=counted) for own in (model, fused))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)
