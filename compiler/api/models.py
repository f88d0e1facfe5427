"""Models as programs have them: files, bytes, protobufs and graphs; every job takes a file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.tensor_protos import external_locations
from qcompile.passes.errors import UserError

# Of a path: the file, or a folder with one model in it.
PathLike: TypeAlias = str | os.PathLike[str]
# A file, its bytes, an onnx.ModelProto, or an onnx_ir.Model.
Model: TypeAlias = PathLike | bytes | onnx.ModelProto | ir.Model

# protobuf's own limit, less what is told beside the weights.
_MOST_INLINE = 2**31 - 2**20


@contextlib.contextmanager
def on_disk(model: Model) -> Iterator[Path]:
    """The file of a model: its own, the only one of a folder, or a temporary one as long as the context lasts. The
    model is left as it is.

    Raises UserError for anything else than a `Model`, and for weights that lie in a file which bytes do not say.
    """
    if isinstance(model, (str, os.PathLike)):
        yield model_file(Path(model))
        return
    if not isinstance(model, (bytes, onnx.ModelProto, ir.Model)):
        raise UserError(
            f"{type(model).__name__} is no model: give a path, bytes, an onnx.ModelProto or an onnx_ir.Model"
        )
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "model-in-memory.onnx"
        _write(model, path)
        yield path


def is_file(model: Model) -> bool:
    """Whether a model is named by its file, so that there is a place beside it."""
    return isinstance(model, (str, os.PathLike))


def _write(model: bytes | onnx.ModelProto | ir.Model, path: Path) -> None:
    if isinstance(model, ir.Model):
        ir.save(model, path, external_data=f"{path.name}.data")
        return
    proto = _parsed(model) if isinstance(model, bytes) else model
    lacking = next(external_locations(proto), None)
    if lacking is not None:
        raise UserError(
            f"the model has weights in a file {lacking!r} and does not say in which folder: give the model's path, or "
            "load it with its weights, as onnx.load does"
        )
    if isinstance(model, bytes):
        path.write_bytes(model)
    elif proto.ByteSize() < _MOST_INLINE:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    else:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)  # saving moves the weights out of what it is given
        onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data")


def _parsed(content: bytes) -> onnx.ModelProto:
    """The protobuf of bytes; empty for what is none, of which `load_model` says what is wrong with it."""
    proto = onnx.ModelProto()
    with contextlib.suppress(Exception):  # protobuf's DecodeError, whose module depends on the implementation
        proto.ParseFromString(content)
        return proto
    return onnx.ModelProto()
