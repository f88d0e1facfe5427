"""Tensors as bytes on disk: finding and checking them, and a file that holds equal bytes once."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.tensors import chunks

# Every tensor starts on a cache line, and one worth mapping by itself on a page.
_ALIGNMENT = 64
_PAGE = 4096
_PAGE_ALIGNED_FROM = 1 << 20


def tensors_of(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor of the model with its name: initializers and attributes of all graphs, subgraphs and functions."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.name or "", value.const_value
    for node, attribute in attributes_of(model):
        where = node.outputs[0].name if node.outputs else node.name
        for tensor in tensors_in(attribute):
            yield where or "", tensor


def attributes_of(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    """Every attribute that holds tensors, with its node, in all graphs, subgraphs and functions."""
    nodes = itertools.chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values()))
    for node in nodes:
        for attribute in node.attributes.values():
            if tensors_in(attribute):
                yield node, attribute


def tensors_in(attribute: ir.Attr) -> list[ir.TensorProtocol]:
    """The tensors an attribute holds; none for most attributes."""
    if attribute.is_ref() or attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return []
    return [attribute.as_tensor()] if attribute.type == ir.AttributeType.TENSOR else list(attribute.as_tensors())


def locate(model: ir.Model, path: Path) -> None:
    """Have every external tensor of the model at `path` name the real file that holds its bytes, checked.

    The rule: a location is relative and never leads upwards, and the file behind it lies in the folder of the model
    file, or, where the model file is a link, in the folder of the file it leads to. So links inside a folder work, and
    the cache of Hugging Face, whose snapshots are links into one folder of blobs; a link from a model's folder to
    anywhere else does not. Locations become absolute paths without links, with an empty base folder: onnx_ir then
    leaves out checks of its own, which know neither that cache nor hard links. Raises UserError.
    """
    files = DataFiles(path)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = located(value.const_value, value.name or "", files)
    for node, attribute in list(attributes_of(model)):
        tensors = tensors_in(attribute)
        if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
            where = (node.outputs[0].name if node.outputs else node.name) or ""
            found = [located(t, where, files) if isinstance(t, ir.ExternalTensor) else t for t in tensors]
            single = attribute.type == ir.AttributeType.TENSOR
            node.attributes[attribute.name] = (
                ir.AttrTensor(attribute.name, found[0]) if single else ir.AttrTensors(attribute.name, found)
            )


class DataFiles:
    """The files that hold the bytes of a model's tensors, each looked for once."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._known: dict[str, tuple[Path, int]] = {}

    def find(self, location: str, where: str) -> tuple[Path, int]:
        """The real file of a location, and its size in bytes."""
        if location not in self._known:
            file = _data_file(location, where, self.model)
            self._known[location] = file, file.stat().st_size
        return self._known[location]


def located(tensor: ir.ExternalTensor, name: str, files: DataFiles) -> ir.ExternalTensor:
    """The tensor `name` of a model, its location an absolute path without links."""
    where = f"tensor {name!r} of the model in {files.model.parent}"
    file, size = files.find(os.fspath(tensor.location), where)
    _check_extent(tensor, where, size)
    found = ir.ExternalTensor(
        file, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name or name
    )
    found.metadata_props.update(tensor.metadata_props)
    return found


def _data_file(location: str, where: str, model: Path) -> Path:
    """The real file of a location, where the rule of `locate` allows it."""
    folders = {model.parent.resolve(), model.resolve().parent}
    upwards = os.path.normpath(location).split(os.sep)[0] == os.pardir
    try:
        file = (model.parent / location).resolve()
        inside = location and not os.path.isabs(location) and not upwards and any(map(file.is_relative_to, folders))
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name that cannot be one
        raise UserError(f"{where}: its external data {location!r} cannot be found: {error}") from error
    if not inside:
        raise UserError(
            f"{where}: its external data {location!r} lies outside of the model's folder; "
            "copy the data file beside the model (cp -L follows links) and export with a relative location"
        )
    if not file.is_file():
        raise UserError(f"{where}: its external data file {location!r} is missing; copy it beside the model")
    return file


def _check_extent(tensor: ir.ExternalTensor, where: str, size: int) -> None:
    """Raise UserError unless the file holds as many bytes as the tensor's type and shape take, where it says."""
    location = os.fspath(tensor.location)
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if offset < 0 or length != tensor.nbytes:
        raise UserError(
            f"{where}: {length} bytes at offset {offset} of {location!r} do not hold {tensor.dtype.name} "
            f"{tuple(tensor.shape)} ({tensor.nbytes} bytes); export the model again"
        )
    if offset + length > size:
        raise UserError(
            f"{where}: {location!r} is too short ({size} bytes, {offset + length} needed); copy or download it again"
        )


class DataWriter:
    """Appends tensors to one external data file, equal bytes once, whatever their shapes and types."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = 0
        self._offsets: dict[tuple[int, bytes], int] = {}

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._end

    def append(self, tensor: ir.TensorProtocol) -> int:
        """The offset of the tensor's bytes, written now unless they stand in the file already."""
        alignment = _PAGE if tensor.nbytes > _PAGE_ALIGNED_FROM else _ALIGNMENT
        start = -(-self._end // alignment) * alignment
        self._file.seek(start)
        digest, length = hashlib.sha256(), 0
        for chunk in chunks(tensor):
            digest.update(chunk)
            self._file.write(chunk)
            length += len(chunk)
        key = (length, digest.digest())
        if key in self._offsets:  # a tie: take back what was written
            self._file.flush()
            self._file.truncate(self._end)
            return self._offsets[key]
        self._offsets[key] = start
        self._end = start + length
        return start

    def digest(self) -> str:
        """A name for the content of the file: equal content, equal digest."""
        whole = hashlib.sha256()
        for (length, content), offset in self._offsets.items():
            whole.update(b"%d %d " % (offset, length) + content)
        return whole.hexdigest()
