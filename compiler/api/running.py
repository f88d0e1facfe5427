"""Running models from a program."""

from collections.abc import Sequence
from typing import Any

from qcompile.compiler.api.models import Model, on_disk
from qcompile.runtime import sessions


def session(
    model: Model,
    *,
    providers: Sequence[str] = ("cpu",),
    kernels: str = "auto",
    accuracy_level: int = 0,
    threads: int | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` of a model, with the native kernels registered where there are any.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        providers: `"cpu"`, `"cuda"` or ONNX Runtime's own names.
        kernels: `"native"` has qcompile's operators computed by the library of kernels, `"portable"` by their ONNX
            bodies; `"auto"` is native where the session runs on the CPU and there is a library.
        accuracy_level: what ONNX Runtime may do in 4-bit products of portable bodies: 0 exact, 4 int8 activations.
        threads: of the session; all cores by default.
    """
    with on_disk(model) as path:  # ONNX Runtime needs no file behind a session
        return sessions.session(
            path, providers=providers, kernels=kernels, accuracy_level=accuracy_level, threads=threads
        )
