"""What an observer is: nodes that give what it needs of a batch of an activation, and what that adds up to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.passes.affine import Array
from qcompile.passes.errors import UserError
from qcompile.passes.spec import ActivationSpec

Outputs = Mapping[str, npt.NDArray[Any]]
State = dict[str, npt.NDArray[Any]]


class Observer(ABC):
    """Statistics of one activation value, of a size that does not depend on the number of its rows.

    Most reduce a batch inside ONNX Runtime, and are of one size. `gram` takes the rows themselves and holds a few
    thousand until it multiplies them; `extents` keeps a few numbers a channel of each batch.

    name: how a recipe calls it. value: the name of the activation. axis: its channel axis (negative from the end), for
    statistics of each channel; None for one of the whole tensor.
    calibrates: a recipe may name it for the ranges of activations: made from a value's name alone it is of the whole
    tensor.
    """

    name: ClassVar[str]
    calibrates: ClassVar[bool] = True

    def __init__(self, value: str, *, axis: int | None = None) -> None:
        self.value, self.axis = value, axis

    @abstractmethod
    def append(self, graph: onnx.GraphProto) -> None:
        """Append nodes that reduce the value, or give it whole, and declare what they give as outputs of the graph.

        Names of nodes begin with the name of the value; what several observers of a value need is appended once.
        """

    @abstractmethod
    def update(self, outputs: Outputs) -> None:
        """Take in what the nodes gave for a batch; UserError where the activation is NaN or infinite."""

    @abstractmethod
    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """(low, high), the range that the grid of `spec` is to span: float32, () or (channels,). Zero lies in it."""

    def expected(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """`range`, fit for rows that were not seen: with room where few were."""
        return self.range(spec)

    @abstractmethod
    def state(self) -> State:
        """Everything learnt so far, as arrays; {} before the first batch."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Continue from what `state` gave."""

    def plot(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(edges, counts) of the value's histogram for a report; both empty where the observer keeps none."""
        return (), ()

    def check_finite(self, *arrays: npt.NDArray[Any]) -> None:
        """Raise UserError where a reduction of the value is NaN or infinite."""
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(
                f"activation {self.value} is NaN or infinite on the calibration data: the model overflows there"
            )


def same_state(a: type[Observer], b: type[Observer]) -> bool:
    """Whether two kinds of observers learn the very same of a value, whatever range they make of it: one that brings no
    node of its own has the nodes, the sums and the state of the class that it derives from.
    """
    return all(getattr(a, own) is getattr(b, own) for own in ("append", "update", "state", "restore"))
