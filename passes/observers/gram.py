"""The Gram matrix of an activation, its largest magnitudes and a sample of its rows: what passes that fit need."""

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.passes.affine import Array
from qcompile.passes.algebra import add_gram, mirror
from qcompile.passes.errors import UserError
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.nodes import add_outputs
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.statistics import Numbers, Statistics

# Rows of a sample at most, of a batch and of all: with K channels that takes less than the Gram matrix if K is more.
CAPACITY = 1024
# Consecutive batches whose sums are added up by themselves before they join the total.
UNIT = 4
# Rows of a unit that are held before they are multiplied: a product of few rows takes as long to write as to compute.
TOGETHER = 2048


class Gram(Observer):
    """XᵀX (K, K), max |x| (K,) and the number of rows of an activation X (…, K), and some of its rows.

    The sample has all rows up to `CAPACITY`. Of more it has every 2nd, 4th, … in the order of the data: half of
    `CAPACITY` at least, whatever batches they came in. Rows of one batch are of one text or picture; where the
    activation has more than two axes, those with one index on its first.
    others: more activations, whose rows are taken together with its own: those that the same weights multiply.

    Float sums depend on their order, so that is fixed: each `UNIT` of batches is added up from zero, and the units to
    the total, in the order of the data. Another process may watch a unit with an observer of its own (`whole`: it
    leaves no row of the sample out); its `state`, given to `merge` in that order, makes the same numbers bit by bit.
    """

    name: ClassVar[str] = "gram"
    calibrates: ClassVar[bool] = False

    def __init__(self, value: str, *others: str, whole: bool = False) -> None:
        super().__init__(value, axis=-1)
        self.others, self.whole = others, whole
        self.rows = 0
        self._gram: Array | None = None
        self._unit: Array | None = None  # the sum of the unit that is not at its end; its lower triangle, as of _gram
        self._held: list[Array] = []  # rows of that unit that the sum does not have yet
        self._batches = 0
        self._absmax = self._rest = np.zeros(0, np.float32)
        self._sample: list[Array] = []  # parts (n, K)
        self._groups: list[Numbers] = []  # their texts or pictures (n,)
        self._stride, self._offered, self._begun = 1, 0, 0

    @property
    def statistics(self) -> Statistics | None:
        """Of everything so far; None before the first row."""
        gram = self.gram
        if gram is None:
            return None
        self._sample, self._groups = [np.concatenate(self._sample)], [np.concatenate(self._groups)]
        return Statistics(self.rows, gram, self._absmax, self._sample[0], self._rest, self._groups[0])

    @property
    def gram(self) -> Array | None:
        """XᵀX (K, K) of everything so far; None before the first row."""
        self._multiply()
        if self._gram is None or self._unit is None:
            found = self._unit if self._gram is None else self._gram
            return found if found is None else mirror(found)
        return mirror(self._gram + self._unit)

    def append(self, graph: onnx.GraphProto) -> None:
        """Of `value` and each other one `.seen`: the same in float32."""
        names = {own: _seen(own) for own in (self.value, *self.others)}
        nodes = (helper.make_node("Cast", [own], [name], to=TensorProto.FLOAT) for own, name in names.items())
        graph.node.extend(nodes)
        add_outputs(graph, names.values())

    def update(self, outputs: Outputs) -> None:
        """Sums and maxima. Arrays are held, as they are, until they are multiplied."""
        seen = [outputs[_seen(own)] for own in (self.value, *self.others)]
        if any(not own.ndim for own in seen):  # what a Loop makes of a value is known only when it runs
            raise UserError(f"activation {self.value} has no axes when the model runs: nothing can be multiplied by it")
        several = [own.reshape(-1, own.shape[-1]) for own in seen]
        rows = np.concatenate(several) if len(several) > 1 else several[0]
        if len(rows):
            self._add(rows, [_groups(own.shape) for own in seen])
        self._batches += 1
        if self._batches % UNIT == 0:
            self._close()

    def merge(self, state: State) -> None:
        """Add the `state` of an observer that saw the next unit of batches, all of it, and no row before."""
        if self._batches % UNIT:
            raise ValueError("units are merged behind whole units")
        self._batches += UNIT
        if not state:
            return
        self._unit = state["gram"]
        self._close()
        _, _, begun = map(int, state["spread"])
        self._peaks(state["absmax"], state["rest"])
        self.rows += int(state["rows"])
        self._take(state["sample"], self._begun + state["groups"])
        self._begun += begun

    def _close(self) -> None:
        """The unit is at its end: its sum joins the total."""
        self._multiply()
        if self._gram is None:
            self._gram = self._unit
        elif self._unit is not None:
            self._gram += self._unit
        self._unit = None

    def _peaks(self, absmax: Array, rest: Array) -> None:
        if len(self._absmax):
            absmax, rest = np.maximum(self._absmax, absmax), np.maximum(self._rest, rest)
        self._absmax, self._rest = absmax, rest

    def _multiply(self) -> None:
        """The rows that are held join the sum of their unit."""
        if self._held:
            rows = np.concatenate(self._held)
            if self._unit is None:
                self._unit = np.zeros((rows.shape[1], rows.shape[1]), np.float32)
            add_gram(self._unit, rows)
            self._held = []

    def _add(self, rows: Array, groups: list[Numbers]) -> None:
        """rows (n, K) of a batch, of those groups of each value."""
        step = _step(len(rows))
        first, every = step * self._due, step * self._stride  # what the sample takes
        peaks = _peaks_of(rows, every)
        if not np.isfinite(peaks).all():
            rows = np.where(np.isfinite(rows).any(axis=1, keepdims=True), rows, np.float32(0))
            peaks = _peaks_of(rows, every)
            self.check_finite(peaks.max(axis=0))
        self._peaks(peaks.max(axis=0), np.delete(peaks, first, axis=0).max(axis=0, initial=0))
        self._held.append(rows)
        if sum(map(len, self._held)) >= TOGETHER:
            self._multiply()
        self.rows += len(rows)
        self._offered += len(rows[::step])
        self._keep(rows[first::every], self._begun + np.concatenate(groups)[first::every])
        self._begun += 1 + max(int(own[-1]) for own in groups if len(own))

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Of each channel, symmetric: the sign of the largest value is not known."""
        assert self.gram is not None
        return -self._absmax, self._absmax

    def state(self) -> State:
        """gram, absmax, rows, sample, its groups, rest, and how far apart the sample's rows are."""
        own = self.statistics
        if own is None or own.sample is None or own.rest is None or own.groups is None:
            return {}
        known = {"gram": own.gram, "absmax": own.absmax, "rows": np.array(own.rows), "sample": own.sample}
        spread = np.array([self._stride, self._offered, self._begun])
        return known | {"rest": own.rest, "groups": own.groups, "spread": spread}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.__init__(self.value, *self.others, whole=self.whole)  # type: ignore[misc]
        if state:
            self.rows, self._gram, self._absmax = int(state["rows"]), state["gram"], state["absmax"]
            self._sample, self._groups, self._rest = [state["sample"]], [state["groups"]], state["rest"]
            self._stride, self._offered, self._begun = map(int, state["spread"])

    def _take(self, rows: Array, groups: Numbers) -> None:
        """Add rows (n, K) of several batches, of those groups (n,), to the sample, as many as are due."""
        due = slice(self._due, None, self._stride)
        self._offered += len(rows)
        self._drop(np.delete(rows, due, axis=0))
        self._keep(rows[due], groups[due])

    @property
    def _due(self) -> int:
        """The next row offered to the sample that it takes."""
        return -self._offered % self._stride

    def _keep(self, rows: Array, groups: Numbers) -> None:
        """Rows (n, K), of which a copy is taken, join the sample; half of it goes where that is too much."""
        self._sample.append(rows.copy())
        self._groups.append(groups)
        while not self.whole and sum(map(len, self._sample)) > CAPACITY:
            whole = np.concatenate(self._sample)
            self._drop(whole[1::2])
            self._sample, self._stride = [np.ascontiguousarray(whole[::2])], 2 * self._stride
            self._groups = [np.concatenate(self._groups)[::2]]

    def _drop(self, rows: Array) -> None:
        self._rest = np.maximum(self._rest, _peaks_of(rows, 1)[0])


def _seen(value: str) -> str:
    """The name of a value as it is given in float32."""
    return f"{value}.seen"


def _peaks_of(rows: Array, every: int) -> Array:
    """max |x| (every, K) of rows (n, K), of one after so many others; 0 of none, and what is not finite stays so."""
    whole = len(rows) // every * every
    turns, peaks = rows[:whole].reshape(-1, every, rows.shape[1]), np.zeros((every, rows.shape[1]), np.float32)
    np.maximum(turns.max(axis=0, initial=0), -turns.min(axis=0, initial=0), out=peaks)
    peaks[: len(rows) - whole] = np.maximum(peaks[: len(rows) - whole], np.abs(rows[whole:]))
    return peaks


def _groups(shape: tuple[int, ...]) -> Numbers:
    """Of each row of an activation of that shape the text or picture of its batch that it is of (rows,)."""
    rows, first = int(np.prod(shape[:-1])), int(shape[0]) if len(shape) > 2 else 1
    return np.arange(first).repeat(rows // max(first, 1))


def _step(rows: int) -> int:
    """How far apart the rows are that a batch of so many gives to the sample."""
    return 2 * (rows // (2 * CAPACITY)) + 1
