"""Sufficient statistics of an activation: what every pass needs instead of the activations themselves."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qcompile.passes.affine import Array
from qcompile.passes.algebra import Compensation, add_gram, damping_of, mirror
from qcompile.passes.rotation import Rotation

Numbers = npt.NDArray[np.int64]

# Rows that every channel is taken to have had beforehand, at what is usual among the channels; and the share of them
# that say what is usual.
_PRIOR, _QUIET = 4, 0.9
# Runs of rows that a sample is cut into, of which every so many-th is held aside: a quarter of the rows, half of few.
# Neighbours in a text or a picture are alike, so single rows would not be unseen.
_RUNS, _EVERY = 8, 4
_FEW_RUNS, _FEW = 4, 16
# The share of a channel's energy that `directions` may leave untold.
_UNTOLD = 1e-3


@dataclass
class Statistics:
    """Statistics of one activation value X (rows, K), summed over all calibration batches.

    gram: XᵀX, float32 (K, K). With it the loss of any weight change D (K, N) is exact: ‖X D‖² = tr(Dᵀ gram D).
    absmax: largest magnitude of each channel, float32 (K,).
    sample: some of the rows, in the order of the data, float32 (n, K); all of them where there are few. None where
    none are known: in guesses, and in what `split` gives to fit with.
    rest: largest magnitudes of the rows that are not in the sample, float32 (K,); zeros where there are none.
    groups: of each row of the sample the number of the text or picture that it is of, int64 (n,). None: each stands
    alone.
    kept: what `compensation` gave, by what it was asked for, for who asks often; None: it is made anew each time.
    rotation: what turned X, if something did. Damping then is that of the channels as they were before: a loud one,
    damped as much as all the channels among which it is spread, would drown them.
    """

    rows: int
    gram: Array
    absmax: Array
    sample: Array | None = None
    rest: Array | None = None
    groups: Numbers | None = None
    kept: dict[tuple[float, int], Compensation] | None = None
    rotation: Rotation | None = None
    _parts: "tuple[Statistics, Array] | None" = field(default=None, init=False, repr=False, compare=False)
    _turned: "tuple[Rotation, Statistics, Array] | None" = field(default=None, init=False, repr=False, compare=False)

    @property
    def mean_square(self) -> Array:
        """E[x²] of each channel, float32 (K,)."""
        return self.diagonal / np.float32(max(self.rows, 1))

    @property
    def energy(self) -> Array:
        """E[x²] of each channel (K,) as far as so few rows tell: drawn towards what is usual among the channels.

        A channel that was silent on three rows is not one that never speaks. After thousands of rows it is
        `mean_square`.
        """
        return np.asarray((self.rows * self.mean_square + _PRIOR * self._usual) / np.float32(self.rows + _PRIOR))

    def compensation(self, damping: float, together: int = 1) -> Compensation:
        """That of the Gram matrix with the rows that `energy` takes as known, all channels independent in them, and
        damping on its diagonal; on the one that it had before a rotation. together: channels that share a code.
        """
        known, key = {} if self.kept is None else self.kept, (damping, together)
        if key not in known:
            rows = np.float32(_PRIOR) * self._usual
            if self.rotation is None:
                added = rows + damping_of(self.diagonal + rows, damping)
                known[key] = Compensation.of(self.gram, added, together)
            else:
                before = rows + damping_of(self.rotation.diagonal_before(self.gram) + rows, damping)
                gram = self.rotation.raised(self.gram, before)
                known[key] = Compensation.of(gram, np.zeros_like(before), together)
        return known[key]

    @property
    def damps_channels(self) -> bool:
        """Whether the damping of `compensation` is of each channel: it is `Compensation.added` then, and the Gram
        matrix is what it was.
        """
        return self.rotation is None

    def times(self, x: Array) -> Array:
        """The Gram matrix times x (K, n)."""
        return self.gram @ x

    def squares(self, delta: Array) -> Array:
        """‖X delta‖² of each column of delta (K, n), (n,)."""
        return np.asarray(np.einsum("kn,kn->n", delta, self.times(delta)))

    @property
    def diagonal(self) -> Array:
        """That of the Gram matrix, (K,)."""
        return np.diagonal(self.gram)

    @property
    def reach(self) -> Array:
        """The largest magnitude that is to be expected of each channel, (K,): the largest seen, or what `energy` says
        of a channel that few rows hardly saw.
        """
        return np.maximum(self.absmax, np.sqrt(self.energy))

    @property
    def _usual(self) -> Array:
        """The square of the channels' mean magnitude, the loudest tenth left out: as they were before a rotation."""
        squares = self.mean_square
        if self.rotation is not None:
            squares = self.rotation.diagonal_before(self.gram) / np.float32(max(self.rows, 1))
        magnitudes = np.sort(np.sqrt(np.maximum(squares, 0)), axis=0)
        usual = magnitudes[: max(1, int(_QUIET * len(magnitudes)))].mean(axis=0)
        return np.asarray(np.square(usual), np.float32)

    def directions(self, most: int) -> int:
        """In how many directions the rows lie, for every channel, but for a thousandth of its energy: 0 of rows of
        zeros, 1 of rows that are all alike but for their size; `most` + 1 where they are more than `most`.

        By Cholesky's factors of the channels' correlations, the channel that is told least first.
        """
        diagonal = np.diagonal(self.gram).astype(np.float64)
        size = np.sqrt(np.maximum(diagonal, np.finfo(np.float32).tiny))
        left, factors = np.where(diagonal > 0, 1.0, 0.0), np.zeros((0, len(size)))
        while left.max(initial=0.0) > _UNTOLD and len(factors) <= most:
            pivot = int(np.argmax(left))
            row = (self.gram[pivot] / size[pivot] / size - factors[:, pivot] @ factors) / np.sqrt(left[pivot])
            factors, left = np.vstack([factors, row]), left - np.square(row)
            left[pivot] = 0.0
        return len(factors)

    @property
    def divisible(self) -> bool:
        """Whether `split` holds rows aside."""
        return self.sample is not None and len(self.sample) >= 2

    def split(self) -> "tuple[Statistics, Array] | None":
        """(statistics of all rows but some, those rows held aside (h, K)); None where fewer than two are known.

        What is fitted to the first is judged on the second: `aside` says which they are. They are kept, with what
        `compensation` gave of them, and follow rewrites: several passes fit to them.
        """
        if self.sample is None or not self.divisible:
            return None
        if self._parts is None:
            aside = self.aside
            held, kept = self.sample[aside], self.sample[~aside]
            gram = self.gram.copy()
            add_gram(gram, held, -1)
            mirror(gram)
            np.fill_diagonal(gram, np.maximum(np.diagonal(gram), 0))
            absmax = np.abs(kept).max(axis=0)
            if self.rest is not None:
                absmax = np.maximum(absmax, self.rest)
            self._parts = Statistics(self.rows - len(held), gram, absmax, kept={}, rotation=self.rotation), held
        return self._parts

    def turned(self, rotation: Rotation) -> "tuple[Statistics, Array] | None":
        """`split` of the rows of X R; kept, too."""
        parts = self.split()
        if parts is None:
            return None
        if self._turned is None or not np.array_equal(self._turned[0].signs, rotation.signs):
            rest, held = parts
            assert self.sample is not None
            peaks = np.abs(rotation.turned(self.sample[~self.aside])).max(axis=0)
            made = rest.rotated(rotation)
            made = replace(made, absmax=np.maximum(made.absmax, peaks), kept={})
            self._turned = rotation, made, rotation.turned(held)
        return self._turned[1:]

    def forget(self) -> None:
        """Let go of what `split` and `turned` keep."""
        self._parts = self._turned = None

    @property
    def aside(self) -> npt.NDArray[np.bool_]:
        """Which rows of the sample are held aside (n,).

        Whole texts or pictures where there are several: what is particular to one of them all its rows share, so that
        they agree with each other about what is wrong for all others. Not more rows than are left.
        """
        rows = 0 if self.sample is None else len(self.sample)
        if self.groups is None or len(groups := np.unique(self.groups)) < 2:
            return held_aside(rows)
        mask = held_aside(len(groups))[np.searchsorted(groups, self.groups)]
        return ~mask if 2 * int(mask.sum()) > rows else mask

    @property
    def held_groups(self) -> Numbers | None:
        """The groups of the rows held aside (h,); None where each stands alone, or all are of one."""
        if self.groups is None or len(np.unique(self.groups)) < 2:
            return None
        return self.groups[self.aside]

    def rescale(self, factor: Array) -> None:
        """Follow a rewrite that divides channel k of the activation by factor[k] (K,)."""
        inverse = (1.0 / factor).astype(np.float32)
        parts, known, was_turned = self._parts, self.kept, self.rotation is not None
        self.forget()
        self.rotation = None
        self.gram = self.gram * inverse[:, None] * inverse[None, :]
        if known is not None:
            self.kept = {} if was_turned else {key: own.followed(self.gram, factor) for key, own in known.items()}
        if parts is not None and not was_turned:
            rest, held = parts
            rest.rescale(factor)
            self._parts = rest, held * inverse
        self.absmax = self.absmax * np.abs(inverse)
        if self.sample is not None:
            self.sample = self.sample * inverse
        if self.rest is not None:
            self.rest = self.rest * np.abs(inverse)

    def rotated(self, rotation: Rotation) -> "Statistics":
        """Those of X R. The largest magnitudes are those of the sample, and what its energy says of a channel: rows
        that are not in the sample may reach further, `Rotation.reach` says how far.
        """
        parts, sample = self.turned(rotation), None if self.sample is None else rotation.turned(self.sample)
        self._parts = None  # large, and of no more use
        if parts is None:
            gram = rotation.gram(self.gram)
        else:
            gram = parts[0].gram.copy()
            add_gram(gram, parts[1])
            mirror(gram)
        rows = np.zeros((0, len(gram)), np.float32) if sample is None else np.abs(sample)
        usual = np.sqrt(np.maximum(np.diagonal(gram), 0) / np.float32(max(self.rows, 1)))
        absmax = np.maximum(rows.max(axis=0, initial=0.0), usual)
        rest = None if self.rest is None else np.zeros_like(absmax)
        made = Statistics(self.rows, gram, absmax, sample, rest, self.groups, rotation=rotation)
        made._parts = parts
        return made

    def part(self, channels: Numbers) -> "Statistics":
        """Those of some channels of X, which is not turned."""
        sample, rest = (None if own is None else own[..., channels] for own in (self.sample, self.rest))
        made = Statistics(self.rows, self.gram[np.ix_(channels, channels)], self.absmax[channels], sample, rest)
        made.groups, made.kept = self.groups, None if self.kept is None else {}
        return made

    def rescaled(self, factor: Array) -> "Statistics":
        """A copy that followed such a rewrite by a factor (K,), or for each column of a weight by another one (K, N).
        What is kept of the Gram matrix follows, too, so that it is factored once for all factors: channels are rounded
        in the order that they had before.
        """
        return _Rescaled(self, factor)


class _Rescaled(Statistics):
    """Statistics of X / factor, of which the Gram matrix is made where it is asked for: products need none.

    Of a factor for each column there is no Gram matrix and no row, and what is of channels is of each column, too.
    """

    def __init__(self, base: Statistics, factor: Array) -> None:
        self.base, self.inverse = base, (1.0 / factor).astype(np.float32)
        self.rows, self.rotation, size = base.rows, None, np.abs(self.inverse)
        self.absmax, self.groups = self._each(base.absmax) * size, base.groups
        alone = factor.ndim == 1
        self.sample = base.sample * self.inverse if alone and base.sample is not None else None
        self.rest = base.rest * size if alone and base.rest is not None else None
        self.kept = None
        if base.kept is not None and alone:
            self.kept = {key: own.rescaled(factor) for key, own in base.kept.items()}

    def rescale(self, factor: Array) -> None:
        self.forget()
        self.__init__(self.base, factor / self.inverse)  # type: ignore[misc]
        self.__dict__.pop("gram", None)

    @cached_property
    def gram(self) -> Array:  # type: ignore[override]
        (inverse,) = self.inverse.reshape(len(self.inverse), -1).T
        return self.base.gram * inverse[:, None] * inverse[None, :]

    def compensation(self, damping: float, together: int = 1) -> Compensation:
        if self.inverse.ndim == 1:
            return super().compensation(damping, together)
        return self.base.compensation(damping, together).rescaled(np.asarray(1 / self.inverse, np.float32))

    @property
    def damps_channels(self) -> bool:
        return self.base.damps_channels

    def times(self, x: Array) -> Array:
        inverse = self.inverse.reshape(len(self.inverse), -1)
        return self.base.times(x * inverse) * inverse

    @property
    def diagonal(self) -> Array:
        return self._each(self.base.diagonal) * np.square(self.inverse)

    def _each(self, channels: Array) -> Array:
        return channels if self.inverse.ndim == 1 else channels[:, None]


def held_aside(count: int) -> npt.NDArray[np.bool_]:
    """Which of so many rows (or groups of them) in order are held aside (count,): every other or fourth run of them,
    none of one.
    """
    runs, every = (_RUNS, _EVERY) if count >= _FEW else (min(_FEW_RUNS, count - count % 2), 2)
    return np.asarray(np.arange(count) * runs // max(count, 1) % every == every - 1)
