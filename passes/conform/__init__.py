"""Whether a finished file keeps to what the documents of its runtime ask for, where that runtime is not at hand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from qcompile.passes.conform import qnn, tensorrt
from qcompile.passes.conform.findings import Findings

# By target.
CHECKS: Mapping[str, Callable[[ir.Model], Findings]] = MappingProxyType({"tensorrt": tensorrt.check, "qnn": qnn.check})
