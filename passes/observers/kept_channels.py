"""An observer of some of the channels of an activation."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.nodes import constant
from qcompile.passes.spec import ActivationSpec


class Rest(Observer):
    """What another observer learns of the channels that stay when some are taken out.

    inner: that observer; its value is a name of its own, which the channels that stay get here.
    kept: int64 (channels,), indices along the last axis of the value.
    """

    name: ClassVar[str] = "rest"

    def __init__(self, value: str, inner: Observer, kept: npt.NDArray[np.int64]) -> None:
        super().__init__(value)
        self.inner, self.kept = inner, kept

    def append(self, graph: onnx.GraphProto) -> None:
        """The channels that stay (…, channels), and what the inner observer appends for it."""
        kept = constant(graph, f"{self.value}.rest.channels", self.kept.tolist())
        graph.node.append(helper.make_node("Gather", [self.value, kept], [self.inner.value], axis=-1))
        self.inner.append(graph)

    def update(self, outputs: Outputs) -> None:
        """By the inner observer."""
        self.inner.update(outputs)

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """By the inner observer."""
        return self.inner.range(spec)

    def expected(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """By the inner observer."""
        return self.inner.expected(spec)

    def state(self) -> State:
        """By the inner observer."""
        return self.inner.state()

    def restore(self, state: State) -> None:
        """By the inner observer."""
        self.inner.restore(state)
