"""Codebooks of pairs, for weights of which two are one code: k-means of the normal distribution (Lloyd 1982).

Rows of a weight behind a rotation are sums of many numbers, and nearly normal, so one codebook serves all weights. It
is fitted to the density itself, on cells of a square grid, from a sunflower's spiral (Vogel 1979) whose points lie as
dense as those of the best quantizer do: the square root of the density (Zador 1982). No random number is in it. The
first pair is (0, 0), so that zeros stay zeros. Rounding to int8 costs 0.03 dB of 256 pairs, less of fewer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

# The largest number of a codebook.
_MOST = 127
# Of what pairs are fitted to: its end in standard deviations, the width of a cell, the least density relative to the
# largest; and how often they move.
_END, _CELL, _LEAST, _ROUNDS = 5.0, 0.06, 1e-6, 60
# Numbers are rounded to halves up to this magnitude before the nearest pair is looked up: what that changes is a
# hundredth of a code's width.
_REACH = 256


@dataclass(frozen=True, eq=False)
class Codebook:
    """pairs: int8 (2^bits, 2). deviation: of the normal distribution that they are fitted to."""

    pairs: npt.NDArray[np.int8]
    deviation: float

    @cached_property
    def products(self) -> npt.NDArray[np.float32]:
        """c, d, -c²/2, -c d and -d²/2 of every pair (c, d), (5, 2^bits)."""
        c, d = self.pairs.astype(np.float32).T
        return np.stack([c, d, -c * c / 2, -c * d, -d * d / 2])

    def nearest(self, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """The codes of pairs of numbers, of equal shapes: both rounded to halves, the nearest pair; of equally near
        ones the first. Beyond `_REACH` a number counts as that.
        """
        return np.asarray(_table(self)[_halves(first) * (4 * _REACH) + _halves(second)])

    def nearest_first(self, first: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """The same of numbers that have no second one beside them, which are not rounded."""
        far = np.abs(first[..., None] - self.pairs[:, 0].astype(np.float32))
        return np.asarray(far.argmin(axis=-1), np.uint8)


def fitted(bits: int) -> Codebook:
    """The codebook of 2^bits pairs, made anew."""
    axis = np.arange(-_END + _CELL / 2, _END, _CELL)
    density = np.exp(-np.square(axis) / 2)
    x, y = (own.reshape(-1, 1) for own in np.meshgrid(axis, axis, indexing="ij"))
    weight = (density[:, None] * density).reshape(-1)
    x, y, weight = x[weight > _LEAST], y[weight > _LEAST], weight[weight > _LEAST]
    size = 1 << bits
    radius = np.sqrt(-4 * np.log(1 - np.arange(size) / size))
    angle = np.arange(size) * np.pi * (3 - np.sqrt(5))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    for _ in range(_ROUNDS):
        own = np.argmin(np.square(pairs).sum(axis=1) - 2 * (x * pairs[:, 0] + y * pairs[:, 1]), axis=1)
        total = np.bincount(own, weight, size)
        for i, numbers in enumerate((x, y)):
            pairs[:, i] = np.bincount(own, weight * numbers[:, 0], size) / total
        pairs[0] = 0
    deviation = _MOST / np.abs(pairs).max()
    return Codebook(np.rint(pairs * deviation).astype(np.int8), float(round(deviation, 3)))


def _halves(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The places of numbers in a table of halves."""
    doubled = np.rint(2 * numbers)
    return np.asarray(np.clip(doubled, -2 * _REACH, 2 * _REACH - 1) + 2 * _REACH, np.int32)


@cache
def _table(book: Codebook) -> npt.NDArray[np.uint8]:
    """The codes of all pairs of halves, flat. All numbers here are halves below 2^17: float32 holds them exactly."""
    halves = np.arange(-2 * _REACH, 2 * _REACH, dtype=np.float32) / 2
    first, second = book.pairs.astype(np.float32).T
    beside = halves[:, None] * second - (np.square(first) + np.square(second)) / 2
    return np.concatenate([(beside + own * first).argmax(axis=1).astype(np.uint8) for own in halves])


def _read(deviation: float, *lines: str) -> Codebook:
    pairs = np.frombuffer(bytes.fromhex("".join(lines)), np.int8).reshape(-1, 2)
    return Codebook(pairs, deviation)


# What `fitted` makes, by the bits of a code: int8 pairs as hexadecimal bytes.
CODEBOOKS: Mapping[int, Codebook] = {
    4: _read(
        63.178,
        "0000cf2301c83024cce935ebff40bfa56d37912f46a82c738ade78e6cc710381",
    ),
    5: _read(
        53.077,
        "0000eb17ffe2141adcf621effa36e2d2360eca1b15c81b41bedd49eed742f3b23f33af023bc9fc68bead6911a63d1d98336e8ed0",
        "75d8c572e4816b498113549f",
    ),
    6: _read(
        46.772,
        "0000f30e01ed0d10eafb15f4fb20efe42109de0f0fdc0f26daec2cf5e526fad0261fce0326dcfd38ddd43b09cd2111c41c38c3ec",
        "3ee5e33eeabd3e23b80f2bc30a4dc4cf51fcc73b02af353da8f946c8f059ceb35a18ad2a20a72657a9d95de1cb58eb9a543d8b18",
        "469e0f78a3b27cfc9e5111814a6882e370bfd97dc7897a34",
    ),
    7: _read(
        41.131,
        "0000f70800f4070af1fd0df9fc13f5ef1306eb0a09eb0818e8f31bfaf016fce41613e10117ebfd22ebe52207e21409dd1221dbf4",
        "24f0ef24f3d92415d60a18dd072cdde42dfde12101d12024cffc28e2f731e5d4310ed21813cf1432cfe935f0e331f4c82f21c507",
        "27d2023cd5d53d02d12709c12535c1f239e0ee3ee3c43e18c11920c31243c4db47f4d339fab73633b5ff39cffa4bd2c34c0cbf2b",
        "15b32649b3e44ae0df48e6b34628b21134bc0856c0c55cfdbf4104a53c47a4f34ecbeb5bd0ad5a1da9252aa91d5daccf5ee4cf56",
        "eb9d52399c0c4caeff6fb3ac730ea5411892396495de6cc2da77cb8e7332892a3e8e1e7f93ba7cebb163fa815a5881fb",
    ),
    8: _read(
        36.902,
        "0000fd0500f90606f7fe08fbfd0cfaf50c04f40606f2050ff2f811fcf60ffeee0f0ced000ef2ff15f2f01504ee0d06ea0c14eaf9",
        "16f6f617f8e8170ce7070fea051beaef1bfeed1500e41316e2fe18eefa1eefe61e08e50f0be20d1ee2f220f7ef1df9de1c14dd06",
        "17e50123e6e72402e31805db151edbf820eef425f0dd240fdb0e12dc0a27deea28f9e721fcd61f1cd60020e4fc2be6de2a08da18",
        "0bd51427d6f12aefed2af3d42917d2091bd9062fdce130fedd2203cf1f26cff929e4f531e8d4300fd11514d11131d2e833f3e32c",
        "f8cb2a21ca0425d8ff37dcd73706d3210bc91e30c9f133e7ec36ebca3419c8101ece0c3ad0dd3cf9d92dffc42a2cc3fc30daf73d",
        "decc3d0fc91e14c41a3ac6e73debe138f0c13624bf0a29cc0442d0d24202cd2d07bd2837bdf33bdced43e1c14119bf191fc11444",
        "c3dc47f2d53af9b83730b70236cdfb4ad2c64a0bc22912b62542b8e747e1e147e7b64426b3132cbe0c4ec2ce50fbc83a02af363d",
        "aff743cff051d5b85018b5251fb11f4fb3d953e9d349f1ab4535a9083cbf0158c4be5a07b9360fa6324da7e852d4e157dcaa5527",
        "a61e2fad155db2c960f3c24afd9d45479cf94fc0f164c7ab6318a633209e2b5ea1d662dece5be79c5639991042ab086bb2b66d01",
        "af49108b42628ce469c6da72cf926d308e27368f237796c07be7b765f0835f5282035ba6f97fae9d7f139549",
    ),
}
