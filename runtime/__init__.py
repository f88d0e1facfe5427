"""Running compiled models with ONNX Runtime."""

from qcompile.passes.library import library_path
from qcompile.runtime.sessions import session

__all__ = ["library_path", "session"]
