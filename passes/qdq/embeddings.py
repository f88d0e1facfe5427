"""Embedding tables in int8, one scale a row, shared with a tied lm_head."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.passes.formats import functions, operator
from qcompile.passes.formats.base import DOMAIN, EMBEDDING, become, drop_unused
from qcompile.passes.formats.emit import floats
from qcompile.passes.graph import Decide, add_initializer
from qcompile.passes.linears import Embedding, find_embeddings
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.weights import SPEC, Stored, WeightStore


def quantize_embeddings(
    model: ir.Model, policy: Policy, store: WeightStore, decide: Decide, *, runtime: str = ""
) -> None:
    """Turn lookups in constant tables into EmbeddingInt8 with symmetric codes; a tied lm_head has the same ones.

    EmbeddingInt8 decodes integers: beside float8 weights, tables are int8 of their own.
    runtime: one for which they stay in float, since the scales of what is looked up are no constants.
    """
    if store.grid.float8:
        store = WeightStore(model, replace(store.grid, float8=False), dry=store.dry)
    for embedding in find_embeddings(model.graph.all_nodes()):
        size, name = int(np.prod(embedding.shape)), embedding.name
        spec = policy.for_embedding(embedding)
        if runtime and not isinstance(spec, str):
            spec = f"{runtime} takes constant scales alone, and those of a lookup are not"
        if isinstance(spec, str):
            decide(name, "kept", spec, kind="Gather", weights=size, weight=embedding.table.name)
            continue
        w = floats(embedding.table).T
        w = w if store.dry else np.ascontiguousarray(w)
        stored = store.store(embedding.table, w, 1, transposed=True)
        _replace(model, embedding, stored)
        decide(
            name,
            "quantized",
            "int8 per row, weights only",
            kind="Gather",
            weights=size,
            weight=stored.codes.name,
            bytes=stored.nbytes,
            bits_per_weight=8 * stored.nbytes / size,
        )


def _replace(model: ir.Model, embedding: Embedding, stored: Stored) -> None:
    codes, scale = stored.quantized.codes, stored.quantized.scale
    if scale.ndim == 0:
        scale = np.broadcast_to(scale, (codes.shape[1],))
    name = f"{stored.codes.name}.lookup"
    dtype = embedding.table.dtype or ir.DataType.FLOAT
    inputs = [
        add_initializer(model.graph, name, ir.tensor(codes)),
        add_initializer(model.graph, f"{name}.scale", ir.tensor(scale.astype(dtype.numpy()).reshape(1, -1))),
        add_initializer(model.graph, f"{name}.zero_point", ir.tensor(np.zeros((1, codes.shape[1]), codes.dtype))),
    ]
    name = operator(EMBEDDING, SPEC)
    functions.register(model, name)
    become(embedding.node, name, [embedding.indices, *inputs], {"block_size": codes.shape[0]}, domain=DOMAIN)
    drop_unused(model, embedding.table)
