"""A session as an application opens it, on one thread: those beside it would spin, and other tests run there."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort


def opened(model: ir.Model | bytes | Path | str) -> ort.InferenceSession:
    """A session of a model, its bytes or its file, with ONNX Runtime's optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = ir.to_proto(model).SerializeToString() if isinstance(model, ir.Model) else model
    source = source if isinstance(source, bytes) else str(source)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
