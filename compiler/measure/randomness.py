"""Operators that draw random numbers: while a model is worked on, every session draws the same ones.

Two runs of a model that adds noise (speech, samplers) have nothing but a distribution in common: no check could tell
noise from what quantization did.

Invariant: behind `settle` every operator that draws has a seed; one that the work gave follows from the name of what is
drawn, so that the graph and its saved file (`repeatable`) draw alike. `release` takes away these seeds and no other.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompile.compiler.files.well_formed import all_nodes
from qcompile.passes.prepare.equal import RANDOM
from qcompile.runtime.sessions import session

_SEEDS = 2**20  # which float32, the type of the attribute, tells apart


def seed_of(name: str) -> float:
    """The seed of the operator that draws the value of this name."""
    return float(1 + zlib.crc32(name.encode()) % _SEEDS)


def settle(model: ir.Model) -> None:
    """Give every operator that draws, and has no seed, one of its own."""
    for node in _drawing(model):
        if "seed" not in node.attributes:
            node.attributes.add(ir.AttrFloat32("seed", seed_of(str(node.outputs[0].name))))


def release(model: ir.Model) -> None:
    """Take away what `settle` gave: the compiled model draws anew in every session, as the original does."""
    for node in _drawing(model):
        given = node.attributes.get("seed")
        if given is not None and not given.is_ref() and given.as_float() == seed_of(str(node.outputs[0].name)):
            del node.attributes["seed"]


def repeatable(path: Path, *, edit: Callable[[onnx.ModelProto], bool] | None = None, **settings: Any) -> Any:
    """A session of a model file, as `runtime.session` opens it, in which what has no seed gets that of `settle`.

    edit: changes the model, without its external data, on its way into the session, and says whether it did.
    """
    if not path.is_file():
        return session(path, **settings)  # which says so
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    edited, drawing = edit is not None and edit(proto), list(_drawing_nodes(proto))
    if not drawing and not edited:
        return session(path, **settings)
    for node in drawing:
        if not any(attribute.name == "seed" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("seed", seed_of(node.output[0])))
    return session(proto.SerializeToString(), folder=path.absolute().parent, **settings)


def draws(proto: onnx.ModelProto) -> bool:
    """Whether anything in a model draws random numbers: each run of a session then goes on from the one before."""
    return any(True for _ in _drawing_nodes(proto))


def _drawing_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in all_nodes(proto) if node.op_type in RANDOM and node.domain in ("", "ai.onnx"))


def _drawing(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from (node for node in graph.all_nodes() if node.op_type in RANDOM and node.domain == "")
