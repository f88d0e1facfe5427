"""LLM.int8(): a few input channels stay in float, all others are codes (Dettmers et al. 2022), chosen beforehand."""

from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.absorb import weight_users
from qcompile.passes.affine import Array, Grid
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.held import NOT_CONFIRMED, too_few
from qcompile.passes.linears import Linear, find_linears
from qcompile.passes.observers import OBSERVERS, Calibrator
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.kept_channels import Rest
from qcompile.passes.observers.output_mse import OutputMse
from qcompile.passes.policy import Policy
from qcompile.passes.proxies import guessed
from qcompile.passes.qdq.outliers import Choice, Judge, Rounded, WeightsAlone, price, row_power
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import Outliers, set_node
from qcompile.passes.statistics import Statistics


class Outlier(Pass):
    """Keep the few input channels in float that cause most of the noise: of an int8 activation, or of coarse weights.

    Linears of one activation keep the same channels, so that it is rounded once for all of them. Nothing is rewritten
    here: nodes are marked, and the pass behind that quantizes writes the two products (`Columns`).
    Case 1: the channels that are worth it, by the noise that they cause: their range spoils the common scale of an
            activation that is rounded, see `outliers.choose`; or the errors of their weights meet large numbers
            (OWQ, Lee et al. 2023), see `outliers.WeightsAlone`.
    Case 2: none, where no number of channels is.
    Case 3: a weight that an embedding shares is left alone: both read the same codes. So is one that several nodes
            read, before `pack`.
    Case 4: none, where channels chosen by some rows are not worth it on rows held aside, or rows are too few for that.
    source: "calibration" has the reach of channels from data; "norms" guesses it from the constants before an
    activation, see `guessed`, and needs no data for it.
    most: the largest share of channels in float. threshold: what each must take off the power of the noise.
    observer: by which the range of the channels that stay is chosen, as in `qdq`.
    """

    name: ClassVar[str] = "outlier"
    decided: ClassVar[str] = "which channels outlier leaves in float"
    reads: Set[Reads] = frozenset({Reads.SCALES})
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.OUTLIERS})

    def __init__(
        self,
        policy: Policy,
        activations: ActivationSpec | None = None,
        *,
        most: float = 0.01,
        threshold: float = 0.1,
        observer: Calibrator = OutputMse.name,
        source: Literal["calibration", "norms"] = "calibration",
    ) -> None:
        super().__init__()
        if not 0 < most <= 0.25:
            raise UserError(f"outlier: most must be above 0 and at most 0.25, got {most}")
        if not 0 < threshold < 1:
            raise UserError(f"outlier: threshold must lie between 0 and 1, got {threshold}")
        self.policy, self.most, self.threshold, self.observer = policy, most, threshold, observer
        self.activations, self.source = activations, source
        self.reads = Outlier.reads if source == "calibration" else frozenset()
        self._observers: dict[ir.Value, Observer] = {}

    def observed_in(self, region: Region) -> Mapping[ir.Value, Observer]:
        """The channels that stay, of every activation of the region that will be rounded."""
        return self._observers

    def call(self, region: Region) -> None:
        """Mark the region's linears."""
        self._observers = {}
        by_value: dict[ir.Value, dict[Linear, Grid]] = {}
        vocabulary = region.vocabulary
        for linear in find_linears(region.live_nodes()):
            spec = self.policy.for_linear(linear, vocabulary)
            if isinstance(spec, str):
                self.decide(linear.name, "skipped", spec)
            elif any(user.op_type == "Gather" for user in weight_users(linear.weight)):  # Case 3
                self.decide(linear.name, "skipped", "weight is tied to the embedding")
            elif self.activations is None and len(weight_users(linear.weight)) > 1:
                self.decide(linear.name, "skipped", "another node reads its weight, too")
            else:
                by_value.setdefault(linear.activation, {})[linear] = spec
        for value, linears in by_value.items():
            known = self._channels(region, value, next(iter(linears)).shape[0])
            if isinstance(known, str):
                self._skip(linears, known)
            else:
                self._mark(region, value, linears, *known)

    def _channels(self, region: Region, value: ir.Value, width: int) -> tuple[Array, Array] | str:
        """(reach, mean square) of every channel, or why they are not known."""
        if self.source == "norms":
            return guessed(value, width)
        statistics = region.statistics.get(value)
        return "its input was not observed" if statistics is None else (statistics.absmax, statistics.mean_square)

    def _mark(
        self, region: Region, value: ir.Value, linears: Mapping[Linear, Grid], reach: Array, power: Array
    ) -> None:
        weights, width = {linear: linear.read() for linear in linears}, len(reach)
        most = min(int(np.ceil(self.most * width)), width - 1)
        if self.activations is not None:
            judge: Judge = Rounded(list(weights.values()))
        else:
            judge = WeightsAlone(row_power([_errors(w, linears[linear]) for linear, w in weights.items()]))
        found = self._judged(region.statistics.get(value), reach, power, judge, most)
        if isinstance(found, str):  # Cases 2 and 4
            self._skip(linears, found)
            return
        rest = self._rest(value, list(weights.values()), found.channels) if self.activations is not None else None
        count, told = len(found.channels), f"{len(found.channels)} of {width} channels stay in float"
        for linear in linears:  # Case 1
            set_node(linear.node, outliers=Outliers(found.channels, rest))
            self.decide(linear.name, "marked", told, channels=count, of=width, relative_noise=found.noise)

    def _rest(self, value: ir.Value, weights: list[Array], channels: npt.NDArray[np.int64]) -> Rest:
        """The observer of the other channels of an activation."""
        kept = np.delete(np.arange(len(weights[0])), channels)
        rest = self._observers[value] = Rest(str(value.name), self._observer(f"{value.name}.rest", weights, kept), kept)
        return rest

    def _judged(
        self, statistics: Statistics | None, reach: Array, power: Array, judge: Judge, most: int
    ) -> Choice | str:
        """The channels that are worth it by all rows, if those chosen by some rows are on others; else why not."""
        choice = judge.choose(reach, power, most=most, threshold=self.threshold)
        if not len(choice.channels):
            return "no channel is worth keeping in float"
        if statistics is None or statistics.sample is None:
            return choice
        if reason := too_few(statistics, channels=True):
            return reason
        fitted, held = statistics.split() or (statistics, statistics.sample)
        trial = judge.choose(fitted.absmax, fitted.mean_square, most=most, threshold=self.threshold)
        seen, energy = np.abs(held).max(axis=0), np.square(held).mean(axis=0)
        if not len(trial.channels) or judge.noise(trial.channels, seen, energy) >= self.threshold_of(trial):
            return NOT_CONFIRMED
        return choice

    def threshold_of(self, choice: Choice) -> float:
        """The share of the noise that may be left for so many channels in float to be worth it."""
        return float((1 - self.threshold) ** price(len(choice.channels)))

    def _observer(self, name: str, weights: list[Array], kept: npt.NDArray[np.int64]) -> Observer:
        if self.observer != OutputMse.name:
            return OBSERVERS[self.observer](name)
        importance = row_power(weights)[kept].astype(np.float32)
        return OutputMse(name, importance=partial(np.asarray, importance))  # a checkpoint pickles it

    def _skip(self, linears: Iterable[Linear], reason: str) -> None:
        for linear in linears:
            self.decide(linear.name, "skipped", reason)


def _errors(w: Array, spec: Grid) -> Array:
    """What plain rounding changes of a weight (K, N)."""
    return np.asarray(round_to_nearest(w, spec, None).dequantize() - w, np.float32)
