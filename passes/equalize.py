"""Cross-layer equalization: channels between convolutions get ranges of one size (Nagel et al. 2019, section 4.1)."""

from collections.abc import Mapping, Set
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Reads
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extents import Extents
from qcompile.passes.tied import Tied, by_inputs, find_tied, is_depthwise, rescale

Floats = npt.NDArray[np.float64]
# Powers of the ranges that are tried. With 1 all channels reach as far, and are cut off together by what was not seen.
_ALPHAS = (0.25, 0.5, 0.75, 1.0)
# The share of the noise that may be left: what less is gained is within the chance of few batches.
_ENOUGH = 0.9
# Factors lie within this of the largest.
_LEAST = 2.0**-8
# Steps of a grid of activations, and of half a grid of weights.
_STEPS, _HALF = 255, 127
# Batches below which none can be held aside.
_FEWEST = 4


class Equalize(Pass):
    """Divide channels between convolutions by factors of their ranges, so that one grid serves them all.

    Weights have a scale for each channel that they give, so makers' weights are rounded as before. Nagel et al. even
    out the ranges of weights, for a scale a tensor; here it is the activations that share one. Of channels k with
    ranges r_k and what reads them makes of an error p_k, the noise of rounding is R² Σ p_k s_k², R = max r_k / s_k,
    which s_k = r_k makes least: Σ p_k r_k² instead of max r_k² Σ p_k. Rounding of the readers' weights is weighed
    beside it: their channels share a scale for each output.
    Case 1: s_k = r_k^alpha, of the alpha of least noise, where on batches held aside, whose range joins that of the
            others, a tenth of the noise goes away. Halves of the batches are held aside in turn.
    Case 2: values whose channels are tied (by sums, pools, Relus) share factors; see `tied`.
    Case 3: nothing where others read the channels, or the data is too little to judge by.
    """

    name: ClassVar[str] = "equalize"
    reads: Set[Reads] = frozenset({Reads.CHANNELS})

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[ir.Value, Extents] = {}

    def watched(self, region: Region) -> Mapping[ir.Value, Observer]:
        """The values that get a grid."""
        found = [tied for tied in find_tied([*region.loose, *region.live_nodes()]) if isinstance(tied, Tied)]
        self._seen = {value: Extents(str(value.name)) for tied in found for value in tied.rounded}
        return self._seen

    def call(self, region: Region) -> None:
        """Choose all factors on the region as it is, then fold them."""
        found = find_tied([*region.loose, *region.live_nodes()])
        whole = [tied for tied in found if isinstance(tied, Tied)]
        weigh = importance(whole)
        chosen = {tied: self._chosen(tied, weigh[tied]) for tied in whole}
        for tied in found:
            if not isinstance(tied, Tied):
                self.decide(tied[0], "skipped", tied[1])
                continue
            own = chosen[tied]
            if isinstance(own, str):
                self.decide(tied.name, "skipped", own)
                continue
            alpha, left, factor = own
            rescale(tied, factor)
            self.decide(tied.name, "folded", f"alpha={alpha:g}", kind="equalized", relative_loss=left)
        self._seen = {}

    def _chosen(self, tied: Tied, weigh: Floats) -> tuple[float, float, Floats] | str:
        """(alpha, noise that is left, factor), or why there is none; Case 1."""
        seen = [self._seen[value] for value in tied.rounded if value in self._seen]
        batches = min((len(own.low) for own in seen), default=0)
        if not seen or not batches:
            return "its channels were not observed"
        if batches < _FEWEST:
            return f"seen on {batches} batches, too few to hold some aside (at least {_FEWEST})"
        noise = Noise(tied, weigh, seen)
        halves = [np.arange(batches) % 2 == number for number in (0, 1)]
        left = {}
        for alpha in _ALPHAS:
            parts = [noise.of(factor_of(noise.reach(half), alpha)) / (noise.of(np.ones(tied.channels)) or 1.0)
                     for half in halves]  # fmt: skip
            left[alpha] = float(np.mean(parts))
        best = min(left, key=left.__getitem__)
        if not left[best] < _ENOUGH:
            return "batches held aside have no less noise so"
        return best, left[best], factor_of(noise.reach(np.ones(batches, bool)), best)


def factor_of(reach: Floats, alpha: float) -> Floats:
    """s = reach^alpha (channels,), the largest 1; 1 for channels that are always zero."""
    most = float(reach.max(initial=0.0))
    share = reach / most if most > 0 else np.zeros_like(reach)
    return np.where(share > 0, np.maximum(share, _LEAST) ** alpha, 1.0)


class Noise:
    """What rounding values and their readers' weights adds, in units of the readers' outputs, by the factor.

    weigh: what readers make of an error in each channel, (channels,). seen: of every value that gets a grid.
    """

    def __init__(self, tied: Tied, weigh: Floats, seen: list[Extents]) -> None:
        self.tied, self.weigh, self.seen = tied, weigh, seen
        self.low, self.high = ([np.asarray(getattr(own, end), np.float64) for own in seen] for end in ("low", "high"))
        self.power = np.mean([own.power.mean(axis=0, dtype=np.float64) for own in seen], axis=0)

    def reach(self, batches: npt.NDArray[np.bool_]) -> Floats:
        """How wide each channel is on some of the batches, the widest of all values, (channels,)."""
        wide = [high[batches].max(axis=0) - low[batches].min(axis=0) for low, high in self._ends(len(batches))]
        return np.asarray(np.max(wide, axis=0))

    def of(self, factor: Floats) -> float:
        """Of grids that span all batches."""
        spans = [(high / factor).max() - (low / factor).min() for low, high in zip(self.low, self.high, strict=True)]
        steps = sum((span / _STEPS) ** 2 for span in spans)
        activations = float(steps / 12 * (self.weigh @ factor**2))
        return activations + sum(self._weights(node, factor) for node in self.tied.readers if not is_depthwise(node))

    def _ends(self, batches: int) -> list[tuple[Floats, Floats]]:
        return [(low[:batches], high[:batches]) for low, high in zip(self.low, self.high, strict=True)]

    def _weights(self, node: ir.Node, factor: Floats) -> float:
        """Of rounding the weights of a reader."""
        w = by_inputs(node)
        by = factor.reshape(w.shape[0], 1, -1, 1)
        steps = np.abs(w * by).max(axis=(2, 3)) / _HALF
        power = (self.power / factor**2).reshape(w.shape[0], -1).sum(axis=1) * w.shape[3]
        return float((np.square(steps).sum(axis=1) * power).sum() / 12)


def importance(groups: list[Tied]) -> dict[Tied, Floats]:
    """What readers make of an error in each channel, (channels,): the squares of its weights; of a depthwise reader
    each as much as what comes of that channel behind it counts.
    """
    home = {node: tied for tied in groups for node in tied.makers}
    found: dict[Tied, Floats] = {}

    def of(tied: Tied) -> Floats:
        if tied not in found:
            found[tied] = np.zeros(tied.channels)  # where a loop of depthwise convolutions leads back here
            found[tied] = np.sum([_read(node) for node in tied.readers], axis=0)
        return found[tied]

    def _read(node: ir.Node) -> Floats:
        squares = np.square(by_inputs(node), dtype=np.float64)
        if is_depthwise(node) and node in home:
            return np.asarray(squares.reshape(len(squares), -1).sum(axis=1) * of(home[node]))
        return np.asarray(squares.sum(axis=(1, 3)).reshape(-1))

    return {tied: of(tied) for tied in groups}
