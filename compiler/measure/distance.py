"""How far outputs are from the float model's: KL of a decoder's logits, else the noise of the outputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.console.numbers import decibels
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.metrics import ROWS, Floats, OutputNoise, kl_divergence, log_softmax, log_softmax_rows
from qcompile.passes.errors import UserError


class Effect(ABC):
    """A distance between outputs and the float model's on the same batches; 0 where they are equal, more is worse.

    metric: "KL" or "SQNR", what `told` gives. outputs: names of what must be computed.
    """

    metric: str
    outputs: Sequence[str]

    @abstractmethod
    def distance(self, outputs: Sequence[Arrays]) -> float:
        """Of the outputs of all batches."""

    @abstractmethod
    def told(self, distance: float) -> str:
        """A distance with its unit."""


class LogitsKl(Effect):
    """Mean over positions of KL(float ‖ outputs) of the next token, nats a token."""

    metric = "KL"

    def __init__(self, name: str, reference: Sequence[Arrays]) -> None:
        self.name, self.outputs = name, [name]
        self._known: list[Floats] = [log_softmax_rows(_rows(arrays[name])) for arrays in reference]

    def distance(self, outputs: Sequence[Arrays]) -> float:
        """Nats a token."""
        parts = [_kl(known, _rows(arrays[self.name])) for known, arrays in zip(self._known, outputs, strict=True)]
        return _finite(float(np.concatenate(parts).mean()), self.name)

    def told(self, distance: float) -> str:
        """In nats."""
        return f"KL {distance:.3g} nats a token"


class OutputSqnr(Effect):
    """‖output - float‖ / ‖float‖ of the output that is worst off; told as signal to noise, -20 log10 of it, in dB."""

    metric = "SQNR"

    def __init__(self, names: Sequence[str], reference: Sequence[Arrays]) -> None:
        self.outputs = list(names)
        self._known = [{name: arrays[name] for name in names} for arrays in reference]

    def distance(self, outputs: Sequence[Arrays]) -> float:
        """Relative, over all batches."""
        errors = []
        for name in self.outputs:
            noise = OutputNoise()
            for known, arrays in zip(self._known, outputs, strict=True):
                noise.add(known[name], arrays[name])
            if noise.noise and not noise.signal:
                raise UserError(f"output {name!r} is zero in float wherever it is compared: no error is relative to it")
            errors.append(_finite(math.sqrt(noise.noise / noise.signal) if noise.noise else 0.0, name))
        return max(errors)

    def told(self, distance: float) -> str:
        """In decibels."""
        return f"SQNR {decibels(distance):.1f} dB"


def effect_of(plan: InputPlan, reference: Sequence[Arrays]) -> Effect:
    """KL for a decoder, else the error of all outputs of float type."""
    if plan.logits is not None:
        return LogitsKl(plan.logits, reference)
    names = [name for name, array in reference[0].items() if array.dtype.kind == "f" and array.size]
    if not names:
        raise UserError("the model has no output of float type whose error could be measured")
    return OutputSqnr(names, reference)


def _rows(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(batch, L, V) as (batch * L, V)."""
    return logits.reshape(-1, logits.shape[-1])


def _kl(known: Floats, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """KL of each row, nats; known: log-softmax (L, V)."""
    parts = []
    for start in range(0, len(known), ROWS):
        rows = slice(start, start + ROWS)
        parts.append(kl_divergence(known[rows], log_softmax(logits[rows])))
    return np.concatenate(parts)


def _finite(distance: float, name: str) -> float:
    if not math.isfinite(distance):
        raise UserError(f"output {name!r} is NaN or infinite where it is compared with the float model's")
    return distance
