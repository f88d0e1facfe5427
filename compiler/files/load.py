"""Models from and to disk: every check of a bad file on the way in, all or nothing on the way out (`saving`)."""

import contextlib
import hashlib
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompile.compiler.files import publish
from qcompile.compiler.files.external_data import locate, tensors_of
from qcompile.compiler.files.one_read import Numbers, numbers_of, read_file
from qcompile.compiler.files.save import SaveReport, save_model
from qcompile.compiler.files.sparse_tensors import make_dense
from qcompile.compiler.files.tensor_protos import external_locations
from qcompile.compiler.files.well_formed import all_graphs, all_nodes, check_model
from qcompile.passes.errors import UserError
from qcompile.passes.formats.half_scales import widen
from qcompile.passes.map_types import MAPS, holds_map, set_maps_aside
from qcompile.passes.tensors import LARGEST

__all__ = [
    "SaveReport",
    "check_finite",
    "check_model_file",
    "check_output_path",
    "check_result_path",
    "hash_and_check",
    "load_model",
    "model_hash",
    "save_model",
]

logger = logging.getLogger(__name__)

# What ONNX Runtime 1.24 to 1.32 load.
MAX_OPSET = 26
MAX_IR_VERSION = 13
_MIN_IR_VERSION = 3
# protobuf's own limit.
_MAX_PROTO = 2**31 - 1
# Operators and operand positions that make an initializer a weight, and operators that only move or convert one.
_WEIGHT_OPERANDS = {(op, index) for op in ("MatMul", "Gemm") for index in (0, 1)} | {
    (op, index) for op in ("Conv", "ConvTranspose", "LSTM", "GRU", "RNN") for index in (1, 2)
}
# What may hold -Inf: tables that are looked up, and biases, which take tokens out of the running so.
_TABLE_OPERANDS = {("Gather", 0), ("Gemm", 2)}
_MOVES = {"Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"}


def load_model(path: Path) -> ir.Model:
    """The model at `path`, its external weights left on disk; UserError for everything that is wrong with the files.

    Behind it the invariant of `well_formed` holds, nodes stand in topological order in every graph and function, and
    the bytes of every tensor that lies in a file of its own are there.
    """
    proto = _parse(path)
    try:
        check_model(proto)
        make_dense(all_graphs(proto), all_nodes(proto))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for value in proto.graph.input:
        if holds_map(value.type):
            raise UserError(f"{path}: graph input {value.name!r} is a map, which cannot be fed: export plain tensors")
    try:
        _drop_devices(proto)
        maps = set_maps_aside(proto)
        with _muted():
            model = ir.serde.deserialize_model(proto)
        model.meta[MAPS] = maps
    except Exception as error:
        raise UserError(f"{path}: damaged ONNX graph ({_root_cause(error)}); export the model again") from error
    _check_versions(model, path)
    _sort(model, path)
    locate(model, path)
    try:
        widen(model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model


def check_finite(model: ir.Model, known: Mapping[int, Numbers] | None = None) -> None:
    """Raise UserError for a NaN in any tensor, or an Inf in a weight; reads every float tensor once, in pieces.

    An Inf elsewhere is legitimate: attention masks are made of them, and -Inf in a table that is looked up or a bias.
    So is a NaN that stands alone. known: what was found of some tensors, by their id.
    """
    weights = {id(value.const_value) for value in _weights(model, _WEIGHT_OPERANDS)}
    tables = {id(value.const_value) for value in _weights(model, _TABLE_OPERANDS)} - weights
    for name, tensor in _looked_at(model):
        own = (known or {}).get(id(tensor)) or numbers_of(tensor)
        if own.nans or (own.infs and id(tensor) in weights) or (own.infs > own.negative and id(tensor) in tables):
            raise UserError(
                f"tensor {name!r} holds {own.nans} NaN and {own.infs} Inf among {tensor.size} values; "
                "export the model again"
            )
        tensor.meta[LARGEST] = own.largest


def hash_and_check(path: Path, model: ir.Model) -> str:
    """`model_hash` of the model at `path`, and `check_finite` of what was loaded from there; files are read once."""
    check_model_file(path)
    inside = defaultdict[Path, list[ir.ExternalTensor]](list)
    for _, tensor in _looked_at(model):
        if isinstance(tensor, ir.ExternalTensor):
            inside[Path(tensor.path)].append(tensor)
    digest, known = hashlib.sha256(), dict[int, Numbers]()
    for file in (path, *sorted(data_files(path))):
        own, found = read_file(file, inside.pop(file.resolve(), ()))
        digest.update(own)
        known |= found
    check_finite(model, known)
    return digest.hexdigest()


def model_hash(path: Path) -> str:
    """sha256 of the model file and of the external data files it names, in order of their names."""
    check_model_file(path)
    digest = hashlib.sha256()
    for file in (path, *sorted(data_files(path))):
        digest.update(read_file(file, ())[0])
    return digest.hexdigest()


def check_output_path(source: Path, output: Path, others: Iterable[Path] = ()) -> None:
    """Raise UserError if writing `output` would lose the source model, its data, or what is no regular file.

    others: files that the work reads beside the model. What another model in the folder names as its data stays, too.
    """
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of the output file, such as {output / 'model.onnx'}")
    if output.name != output.name.encode(errors="replace").decode():
        raise UserError(f"the name of the output {output} is no text; choose another one")
    if output.suffix.lower() == ".ort":
        raise UserError(f"{output}: ONNX Runtime takes a file of this name for one in its own format; name it .onnx")
    publish.check_place(output)
    if not output.exists():
        return
    for file in (source, *data_files(source), *others):
        if file.exists() and output.samefile(file):
            raise UserError(f"the output {output} is the input file {file}; choose another name")
    for model in publish.models_that_mention(output):
        if output.name in _locations(model):
            raise UserError(f"{output} holds weights of {model}, which would lose them; choose another name")


def check_result_path(models: Sequence[Path], output: Path, others: Iterable[Path] = ()) -> None:
    """`check_output_path` for a file that is no model (results, a recipe, statistics), and replaces none either."""
    others = [*others, *models, *(file for model in models for file in data_files(model))]
    check_output_path(models[0], output, others)
    if output.exists() and publish.may_be_model(output):
        raise UserError(f"{output} is an ONNX model, which would be lost; choose another name")


def check_model_file(path: Path) -> None:
    """Raise UserError unless the path is a regular file: reading a pipe may wait for ever."""
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of an .onnx model")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an .onnx model")


def _parse(path: Path) -> onnx.ModelProto:
    check_model_file(path)
    if path.stat().st_size > _MAX_PROTO:
        raise UserError(f"{path} is over 2 GB, which no ONNX model file can be; save its weights as external data")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except Exception as error:  # protobuf's DecodeError, whose module depends on the implementation
        raise UserError(f"{path} is no ONNX model, or a truncated one{_looks_like(path)}") from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise UserError(f"{path} holds no ONNX graph{_looks_like(path)}")
    if not proto.graph.node or not proto.graph.output:
        raise UserError(f"{path}: the graph has no nodes or no outputs, nothing to compile; export the model again")
    if not proto.opset_import:
        raise UserError(f"{path} names no opset: it is truncated; copy or export it again")
    return proto


def _drop_devices(proto: onnx.ModelProto) -> None:
    """Forget how nodes are spread over devices, which one machine does not need and onnx_ir does not always write."""
    del proto.configuration[:]
    for node in all_nodes(proto):
        del node.device_configurations[:]


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Nothing said about unknown keys of external data, and bytes in attributes of others' operators."""
    told = logging.getLogger("onnx_ir.serde")
    disabled, told.disabled = told.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.disabled = disabled


def _looks_like(path: Path) -> str:
    """The end of a message about a file that is no model: what it is instead, and what to do."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer: run `git lfs pull`"
    if start.startswith(b"GGUF") or start[8:10] == b'{"':
        return "; it holds weights without a graph: run `qcompile export` first"
    if start[4:8] == b"ORTM":
        return "; it is in ORT format: give the .onnx file it was made from"
    return "; copy or export it again"


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:  # onnx_ir wraps, and fails while it wraps
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _check_versions(model: ir.Model, path: Path) -> None:
    imports = model.opset_imports
    if "ai.onnx" in imports:  # an alias of the empty domain
        imports[""] = max(imports.pop("ai.onnx"), imports.get("", 0))
    opset = imports.get("", 1)
    if opset > MAX_OPSET:
        raise UserError(f"{path} has opset {opset}; ONNX Runtime loads up to {MAX_OPSET}: export it with a lower one")
    if model.ir_version < _MIN_IR_VERSION:
        raise UserError(f"{path} has IR version {model.ir_version}, from before ONNX 1.0; export the model again")
    if model.ir_version > MAX_IR_VERSION:
        logger.info("IR version %d lowered to %d", model.ir_version, MAX_IR_VERSION)
        model.ir_version = MAX_IR_VERSION


def _sort(model: ir.Model, path: Path) -> None:
    """Topological order, which old files do not always have."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        try:
            graph.sort()
        except ValueError as error:
            raise UserError(f"{path}: the graph has a cycle ({error}); export the model again") from error


def _weights(model: ir.Model, operands: Set[tuple[str, int]]) -> Iterator[ir.Value]:
    """Initializers that a linear operator or a lookup uses, maybe through something that only moves them."""
    for value in model.graph.initializers.values():
        reached = [value]
        for current in reached:  # grows while it is walked
            reached += [use.node.outputs[0] for use in current.uses() if use.node.op_type in _MOVES and use.idx == 0]
            if any((use.node.op_type, use.idx) in operands for use in current.uses()):
                yield value
                break


def _looked_at(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """The tensors of more than one float, by name."""
    for name, tensor in tensors_of(model):
        if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16 and tensor.size >= 2:
            yield name, tensor


def data_files(path: Path) -> set[Path]:
    """The external data files that the model at `path` names and that exist."""
    return {file for name in _locations(path) if "\0" not in name and (file := path.parent / name).is_file()}


def _locations(path: Path) -> set[str]:
    """The names of data files in a model; none of what is no model: load_model says what is wrong with it."""
    try:
        return set(external_locations(_parse(path)))
    except (UserError, UnicodeDecodeError):
        return set()
