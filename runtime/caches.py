"""A decoder's caches from run to run: in one buffer where GroupQueryAttention lengthens them, else handed over."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.runtime.sessions import bound_outputs, failures, on_device, ort_value


@dataclass(frozen=True)
class Caches:
    """presents: a cache's input → the output that gives it back, longer by the rows of the run.

    shared: both may be one buffer (batch, heads, room, width), of which the other inputs say how much is filled.
    tokens: the input whose last axis says how many rows a run adds.
    """

    presents: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False
    tokens: str = ""


class Decoder:
    """A session of a decoder on one batch of sequences: each run takes the tokens behind those of all runs before.

    Its outputs are, to the last bit, those of a session whose caches are copied out and in again. With a shared buffer
    ONNX Runtime writes a run's keys and values behind the others', and copies none; room that does not suffice is
    doubled. Without, a run takes the very values that the run before it gave. On CUDA both stay on the device:
    unverified on GPU.

    room: for how many tokens there is some from the first run on. seconds: of the last run, inside ONNX Runtime.
    """

    def __init__(self, session: Any, caches: Caches, outputs: Sequence[str], *, room: int = 0) -> None:
        self.session, self.caches, self.outputs = session, caches, list(outputs)
        self.seconds = 0.0
        self._binding = session.io_binding()
        self._device = on_device(session)
        self._kept: dict[str, Any] = {}  # by the caches' inputs
        self._room, self._filled, self._least = 0, 0, room

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs; the first run's feeds hold the caches to begin with, empty ones or others."""
        return [value.numpy() for value in self.step(feeds)]

    def step(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """`run`, with outputs as the OrtValues that they are."""
        own = {name: np.asarray(a, order="C") for name, a in feeds.items() if name not in self.caches.presents}
        with failures(feeds):
            for name, array in own.items():
                self._binding.bind_cpu_input(name, array)
            for name in self.outputs:  # anew, or their last values would be written over
                self._binding.bind_output(name, "cpu")
            if self.caches.shared:
                self._make_room(feeds)
            else:
                self._hand_over(feeds)
            started = time.perf_counter()
            self.session.run_with_iobinding(self._binding)
            self.seconds = time.perf_counter() - started
        if self.caches.shared:  # whose values are the buffers, which the binding has
            self._filled += self._rows(feeds)
            return bound_outputs(self._binding, len(self.outputs))
        found = bound_outputs(self._binding)
        self._kept = dict(zip(self.caches.presents, found[len(self.outputs) :], strict=True))
        return found[: len(self.outputs)]

    def _hand_over(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, present in self.caches.presents.items():
            if self._kept:
                self._binding.bind_ortvalue_input(name, self._kept[name])
            else:
                self._binding.bind_cpu_input(name, np.asarray(feeds[name], order="C"))
            self._binding.bind_output(present, self._device)

    def _make_room(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Buffers that hold the rows of this run, too, bound to inputs and outputs."""
        if not self._kept:
            self._filled = feeds[next(iter(self.caches.presents))].shape[2]
        needed = self._filled + self._rows(feeds)
        if self._kept and needed <= self._room:
            return
        self._room = max(needed, 2 * self._room, self._least)
        for name, present in self.caches.presents.items():
            old = self._kept[name].numpy() if name in self._kept else feeds[name]
            new = np.zeros((*old.shape[:2], self._room, old.shape[3]), old.dtype)
            new[:, :, : self._filled] = old[:, :, : self._filled]
            self._kept[name] = value = ort_value(new, self._device)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(present, value)

    def _rows(self, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
        """How many positions a run adds."""
        return int(feeds[self.caches.tokens].shape[-1])
