"""A score of the user's own: module:function, called with what a model was given and gave."""

from collections.abc import Callable, Sequence

import numpy as np

from qcompile.compiler.data import user_code
from qcompile.compiler.data.labels import Labels
from qcompile.compiler.data.npz import Arrays
from qcompile.passes.errors import UserError

# (inputs, outputs, labels): dicts of arrays by name, one for each batch, and the labels of all rows or None; a number,
# of which more is better, unless the function has an attribute lower_is_better.
Function = Callable[[Sequence[Arrays], Sequence[Arrays], Labels | None], float]


class Metric:
    """A function, or that of a reference such as "metrics:f1"."""

    def __init__(self, reference: str | Function) -> None:
        if not isinstance(reference, str):
            self.name, self._function = getattr(reference, "__name__", type(reference).__name__), reference
            self.lower_is_better = bool(getattr(reference, "lower_is_better", False))
            return
        self.name = reference
        self._function = user_code.found(reference, "--metric")
        self.lower_is_better = bool(getattr(self._function, "lower_is_better", False))

    def score(self, inputs: Sequence[Arrays], outputs: Sequence[Arrays], labels: Labels | None) -> float:
        """What it says of a model; UserError where it fails or gives no number."""
        with user_code.told(f"--metric {self.name}"):
            value = float(self._function(inputs, outputs, labels))
        if not np.isfinite(value):
            raise UserError(f"--metric {self.name} gave {value}")
        return value


class Drop:
    """The most that a score may lose: "0.5%" of the float model's, or so much of its own unit."""

    def __init__(self, text: str) -> None:
        self.text, number = text.strip(), text.strip().removesuffix("%")
        try:
            self.most = float(number)
        except ValueError as error:
            raise UserError(f"--max-drop takes a share such as 0.5% or a number, got {text!r}") from error
        self.relative = self.text.endswith("%")
        if self.most < 0 or not np.isfinite(self.most):
            raise UserError(f"--max-drop takes a share such as 0.5% or a number, got {text!r}")

    def of(self, before: float, after: float, *, lower_is_better: bool = False) -> float:
        """What was lost, in the unit of `most`."""
        lost = after - before if lower_is_better else before - after
        if not self.relative:
            return lost
        return 100 * lost / abs(before) if before else (0.0 if lost <= 0 else float("inf"))

    def told(self, lost: float) -> str:
        """A loss with its unit."""
        return f"{lost:.3g}{'%' if self.relative else ''}"
