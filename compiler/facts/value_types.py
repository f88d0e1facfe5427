"""What ONNX Runtime says of the types of inner values, for operators that onnx does not know."""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

# Names of element types in ONNX Runtime's "tensor(…)" that are not those of onnx in lower case.
_NAMES = {"float": TensorProto.FLOAT, "double": TensorProto.DOUBLE}


def told_by_runtime(model: onnx.ModelProto, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the values of these names in the main graph; none where ONNX Runtime cannot say.

    model: may lack the data of its weights, which are graph inputs here; it is not run. The model is not changed.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    graph = bare.graph
    kept = [tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        outputs = session(bare.SerializeToString(), optimize=False, kernels="portable").get_outputs()
    except UserError:  # what is wrong with the model is told when it runs
        return []
    return [made for output in outputs if (made := _info(output.name, output.type, output.shape)) is not None]


def _info(name: str, kind: str, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto | None:
    inner = kind.removeprefix("tensor(").removesuffix(")")
    number = _NAMES.get(inner) or dict(TensorProto.DataType.items()).get(inner.upper())
    if not kind.startswith("tensor(") or not number:
        return None
    return helper.make_tensor_value_info(
        name, number, list(shape) or None
    )  # [] is no shape as well as that of a scalar
