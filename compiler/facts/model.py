"""Facts of a model: element type, size on disk, and the versions of what works on it."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir

from qcompile.runtime.sessions import ort_version


def versions() -> dict[str, str]:
    """Versions of everything that decides the result."""
    names = ("qcompile-onnx", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {"onnxruntime": ort_version(), **{name: _version(name) for name in names}}


@cache
def _version(name: str) -> str:
    """Of an installed package; its metadata takes as long to read as a small graph to quantize."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def element_type(model: ir.Model) -> ir.DataType:
    """The float type of most weights."""
    sizes: dict[ir.DataType, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=ir.DataType.FLOAT)


def file_size(path: Path, model: ir.Model) -> int:
    """Bytes of a model file and of the external data it uses."""
    tensors = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    return path.stat().st_size + sum({(t.location, t.offset): t.nbytes for t in tensors}.values())
