"""A choice that data makes, tried on a copy of the model and judged by the outputs on samples it was not fitted to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.files.disk_arrays import Spill
from qcompile.compiler.walk.runner import Runner, Stream
from qcompile.compiler.walk.segments import split
from qcompile.passes.base import Decision, Region, WalksAgain, on_clone
from qcompile.passes.linears import find_linears
from qcompile.passes.observers.mean import PARTS
from qcompile.passes.state import node_state
from qcompile.passes.threads import ONE_BLAS_THREAD

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# Samples held aside from which on they say anything, and at most so many batches of them.
FEWEST, _MOST = 4, 16
# Standard errors that a gain must exceed.
_DEVIATIONS = 2.0


@dataclass(frozen=True)
class Verdict:
    """Whether a choice is kept, and why."""

    kept: bool
    reason: str


@dataclass(frozen=True)
class Held:
    """Batches with samples that are held aside. rows: by batch, which of its rows they are; None: all of it is one."""

    batches: Sequence[Batch]
    rows: Sequence[Mask | None]

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(1 if own is None else int(own.sum()) for own in self.rows)


def held(batches: Sequence[Batch]) -> Held:
    """What `Mean` puts into its parts 1 and 3. Decode steps are left out: they need the batch before.

    Case 1: every other batch.
    Case 2: of fewer than four batches the second and the last quarter of each one's rows. A row is a sample only where
            all inputs have as many: one text, or one picture, is a sample as a whole and cannot be held aside in part.
    """
    if len(batches) >= PARTS:  # Case 1
        odd = [batch for batch in batches[1::2] if batch.follows is None]
        picked = [odd[i] for i in np.unique(np.linspace(0, len(odd) - 1, min(len(odd), _MOST)).round().astype(int))]
        return Held(picked, [None] * len(picked))
    alone = [batch for batch in batches if batch.follows is None]
    return Held(alone, [quarters(_leading(batch.feeds)) for batch in alone])  # Case 2


def quarters(rows: int) -> Mask:
    """Which of so many rows lie wholly in the second or the last quarter (rows,)."""
    start = PARTS * np.arange(rows)
    number = start // max(rows, 1)
    return np.asarray((number % 2 == 1) & (start + PARTS <= (number + 1) * rows))


def _leading(feeds: Arrays) -> int:
    """The rows that all inputs have; 1 where they differ."""
    sizes = {array.shape[0] for array in feeds.values() if array.ndim}
    return sizes.pop() if len(sizes) == 1 else 1


def through(late: WalksAgain, runner: Runner, batches: Sequence[Batch]) -> None:
    """Take batches through the runner's graph, segment by segment, for a pass that walks again."""
    stream = Stream(batches)
    for segment in split(runner.model, _is_integer) if batches else ():
        with ONE_BLAS_THREAD:
            for observers in late.walk_again(Region(runner.model, list(segment.nodes))):
                runner.observe(segment, observers, stream)
        runner.advance(segment, stream)


def tried(
    late: WalksAgain, runner: Runner, original: ir.Model, batches: Sequence[Batch]
) -> tuple[Verdict, Sequence[Decision]]:
    """(whether what the pass would do to the runner's graph is to be kept, what it did to a copy).

    original: the graph before any pass behind the walk, which outputs are compared with.
    """
    aside = held(batches)
    if aside.samples < FEWEST:
        few = f"of the calibration data {aside.samples} samples (pictures, texts, rows) could be held aside, too few"
        return Verdict(False, f"{few} to judge a correction on (at least {FEWEST})"), ()
    made, copy = on_clone(late, runner.model)
    every = 2 if len(batches) >= PARTS and all(batch.follows is None for batch in batches) else 1
    made.hold_aside(every)
    through(made, replace(runner, model=copy), batches[::every])
    if not any(own.action == "corrected" for own in made.decisions):
        return Verdict(False, "there was nothing to correct"), made.decisions
    linears = {linear.node for linear in find_linears(original.graph)}
    known = graph_outputs(replace(runner, model=original), linears.__contains__, aside.batches)
    errors = [
        sample_errors(known, graph_outputs(replace(runner, model=graph), _is_integer, aside.batches), aside)
        for graph in (runner.model, copy)
    ]
    return judged(*errors), made.decisions


def _is_integer(node: ir.Node) -> bool:
    return node_state(node).twin is not None


def graph_outputs(
    runner: Runner, is_target: Callable[[ir.Node], bool], batches: Sequence[Batch]
) -> Mapping[str, Sequence[npt.NDArray[np.generic]]]:
    """Every output of a graph that is no cache, for each batch; put aside in files where they are large."""
    presents = {pair.present for pair in runner.plan.past}
    names = [str(value.name) for value in runner.model.graph.outputs if value.name not in presents]
    found, stream = {name: Spill() for name in names}, Stream(batches)
    for segment in split(runner.model, is_target):
        runner.advance(segment, stream, found)
    return found


def sample_errors(
    original: Mapping[str, Sequence[npt.NDArray[np.generic]]],
    made: Mapping[str, Sequence[npt.NDArray[np.generic]]],
    aside: Held,
) -> Floats:
    """The squared error of each sample (samples,): over all float outputs, each at unit power over all samples.

    Outputs whose shape depends on their content, and those without a row for each of a batch's rows, are left out.
    """
    total = np.zeros(aside.samples)
    for name, known in original.items():
        errors, powers = [], []
        for wanted, found, rows in zip(known, made[name], aside.rows, strict=True):
            fits = wanted.dtype.kind == "f" and wanted.shape == found.shape
            if not fits or (rows is not None and (not wanted.ndim or len(wanted) != len(rows))):
                break
            x, y = (_samples(array, rows) for array in (wanted, found))
            known_finite = np.isfinite(x) & np.isfinite(y)
            errors.append(np.where(known_finite, y - x, 0.0))
            powers.append(np.where(known_finite, x, 0.0))
        else:
            power = sum(float(np.square(x).sum()) for x in powers)
            if power > 0:
                total += np.concatenate([np.square(error).sum(axis=1) for error in errors]) / power
    return total


def _samples(array: npt.NDArray[np.generic], rows: Mask | None) -> Floats:
    """Its samples (samples, numbers)."""
    picked = array.reshape(1, -1) if rows is None else array[rows].reshape(int(rows.sum()), -1)
    return picked.astype(np.float64)


def judged(before: Floats, after: Floats) -> Verdict:
    """Whether a choice is kept; before, after: the squared errors of each sample without and with it.

    It has to make their sum smaller, and samples as a rule: the mean of the logarithms of what is left of each error,
    and `_DEVIATIONS` standard errors, lie below 0. By the sum alone one sample in ten decides for all, of a classifier
    that is sure of the others.
    """
    told = f"the outputs on {len(before)} samples held aside"
    if not before.any():
        return Verdict(False, f"{told} have no error to take away")
    known = (before > 0) & (after > 0)
    ratios = np.log(after[known] / before[known])
    if len(ratios) < FEWEST:
        return Verdict(False, f"{told} do not confirm a gain")
    mean, error = float(ratios.mean()), float(ratios.std(ddof=1)) / np.sqrt(len(ratios))
    kept, decibels = mean + _DEVIATIONS * error < 0 and bool(after.sum() < before.sum()), 10 / np.log(10)
    told += " confirm a gain" if kept else " do not confirm a gain"
    return Verdict(kept, f"{told}: {-decibels * mean:+.2f} dB, give or take {decibels * error:.2f}")
