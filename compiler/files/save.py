"""Saving a model, all or nothing.

A saved model is `name.onnx` and `name-<digest>.data`. The data file is named by its content, so replacing a model never
touches the data its predecessor points to: the new data file appears first, then the model file is replaced in one
step, then data files that no model mentions any more are removed, all of that under a lock. Killed at any moment, the
path holds a complete model, the new one or the old one.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.compiler.files import publish
from qcompile.compiler.files.external_data import DataWriter, attributes_of, tensors_in, tensors_of
from qcompile.passes.errors import UserError
from qcompile.passes.map_types import tell_maps
from qcompile.passes.tensors import chunks

# Smaller tensors stay in the model file, where they cost less than an entry in the data file.
_INLINE_BELOW = 1024
_CODES = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class SaveReport:
    """What save_model wrote: sizes in bytes, and the files, the model first."""

    model_bytes: int
    data_bytes: int
    paths: tuple[Path, ...]


def save_model(
    model: ir.Model, path: Path, *, metadata: Mapping[str, str] | None = None, check_space: bool = True
) -> SaveReport:
    """Write the model to `path` and its weights beside it, completely or not at all; the model itself stays as it is.

    Weights are evaluated and written one at a time, equal bytes once. `metadata` joins the model's own metadata.
    """
    path = path.absolute()
    with publish.staging(path) as staged, publish.writing(path):
        if check_space:
            _check_space(model, path.parent)
        report = _write(model, staged, metadata or {})
        return replace(report, paths=publish.publish(report.paths, path))


def foretold_size(model: ir.Model, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that `save_model` would write, but for equal tensors at different places; no weight is read."""
    offsets = {
        value: 0
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and tensor.dtype != ir.DataType.STRING
        and tensor.nbytes >= _INLINE_BELOW
    }
    places = {_place(tensor): tensor.nbytes for value in offsets if (tensor := value.const_value) is not None}
    return len(_serialize(model, "data", offsets, metadata or {})) + sum(places.values())


def _place(tensor: ir.TensorProtocol) -> object:
    """Where the bytes of a tensor lie: the same for tensors that share them."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset
    if isinstance(tensor, ir.LazyTensor):
        return id(tensor)
    raw = tensor.raw if isinstance(tensor, ir.Tensor | ir.PackedTensor) else None
    return raw.__array_interface__["data"][0] if isinstance(raw, np.ndarray) else id(tensor)


def _check_space(model: ir.Model, folder: Path) -> None:
    needed = sum({id(tensor): tensor.nbytes for _, tensor in tensors_of(model)}.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the output needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            "free some space or write elsewhere"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_beside(model: ir.Model, path: Path) -> None:
    """Write the model into a folder that is still to be published: `path`, and its weights in `path`.data."""
    data = path.with_name(f"{path.name}.data")
    offsets, _ = _write_data(model, data)
    path.write_bytes(_serialize(model, data.name, offsets, {}))


def _write_data(model: ir.Model, data: Path) -> tuple[dict[ir.Value, int], DataWriter]:
    """Where the weights lie in the file that is written, and what wrote it."""
    offsets: dict[ir.Value, int] = {}
    with open(data, "wb") as file:
        writer = DataWriter(file)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _INLINE_BELOW:
                offsets[value] = writer.append(tensor)
        publish.settle(file)
    return offsets, writer


def _write(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> SaveReport:
    """Write the model to a staged path, and its data beside it."""
    data = path.with_name(f"{path.name}.data")
    offsets, writer = _write_data(model, data)
    final = publish.data_path(path, writer.digest()) if offsets else None
    content = _serialize(model, final.name if final else "", offsets, metadata)
    with open(path, "wb") as file:
        file.write(content)
        publish.settle(file)
    if final is not None:
        data.rename(final)
    return SaveReport(len(content), writer.size, (path, final) if final else (path,))


def _serialize(model: ir.Model, location: str, offsets: Mapping[ir.Value, int], metadata: Mapping[str, str]) -> bytes:
    """The model file's bytes, with the tensors of `offsets` in the file `location` and all others inline."""
    values = [
        value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
    ]
    tensors = [value.const_value for value in values]
    attributes = [(node, attribute) for node, attribute in attributes_of(model) if _any_on_disk(attribute)]
    try:
        for value, tensor in zip(values, tensors, strict=True):
            assert tensor is not None
            offset = offsets.get(value)
            value.const_value = _inline(tensor) if offset is None else _placed(value, tensor, location, offset)
        for node, attribute in attributes:
            node.attributes[attribute.name] = _inline_attribute(attribute)
        proto = ir.serde.serialize_model(model)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
        for node, attribute in attributes:
            node.attributes[attribute.name] = attribute
    _drop_told_twice(proto.graph)
    tell_maps(proto, model)
    merged = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    del proto.metadata_props[:]
    for key, text in merged.items():
        proto.metadata_props.add(key=key, value=text)
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _drop_told_twice(graph: onnx.GraphProto) -> None:
    """Drop the stated types of initializers, which state their own, and of codes and what is decoded from them."""
    told = {tensor.name for tensor in graph.initializer}
    told.update(name for node in graph.node if node.op_type in _CODES and node.domain == "" for name in node.output)
    kept = [value for value in graph.value_info if value.name not in told]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _placed(value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "")


def _inline(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    content = np.frombuffer(b"".join(chunks(tensor)), np.uint8)
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(content, tensor.dtype, shape=tensor.shape, name=tensor.name)
    return ir.Tensor(content.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy()), tensor.dtype, name=tensor.name)


def _any_on_disk(attribute: ir.Attr) -> bool:
    return any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors_in(attribute))


def _inline_attribute(attribute: ir.Attr) -> ir.Attr:
    tensors = [_inline(tensor) for tensor in tensors_in(attribute)]
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, tensors[0])
    return ir.AttrTensors(attribute.name, tensors)
