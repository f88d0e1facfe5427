"""What activations look like where nothing was run: guessed from the constants that scale them."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompile.passes.absorb import trace
from qcompile.passes.affine import Array
from qcompile.passes.channel_map import last_axis
from qcompile.passes.linears import constant
from qcompile.passes.statistics import Statistics

# How far the activations of a channel are taken to reach, in standard deviations.
_DEVIATIONS = 6
# Rows that guessed statistics stand for: as many as calibration has by default. Only noise relative to them counts.
_ROWS = 32 * 512


def guessed(value: ir.Value, width: int) -> tuple[Array, Array] | str:
    """(reach, mean square) of the channels (width,) of an activation, from the constants that scale them.

    Case 1: gamma and beta of the normalization before it: of numbers with variance 1 they make gamma² + beta².
    Case 2: the weight of the linear before it, seen as in `smooth`: the squared norm of a channel's column.
    Reach is so many standard deviations for all. Only relations between the channels count. Else the reason why not.
    """
    found = trace(value)
    if isinstance(found, str):
        return f"no norm or linear before it: {found}"
    channels = last_axis(found.index, width)
    if isinstance(channels, str):
        return f"no norm or linear before it: {channels}"
    squares = np.zeros(int(channels.max()) + 1)
    for absorber in found.absorbers:
        array = np.asarray(constant(absorber.constant).numpy(), np.float64)
        index = np.broadcast_to(absorber.index, array.shape)
        inside = index < len(squares)
        np.add.at(squares, index[inside], np.square(array[inside]))
    power = squares[channels].astype(np.float32)
    return np.float32(_DEVIATIONS) * np.sqrt(power), power


def proxies(activations: Iterable[tuple[ir.Value, int]]) -> dict[ir.Value, Statistics]:
    """Guessed statistics of activations, each with its number of channels; none where nothing can be guessed.

    Channels are taken to be independent: the Gram matrix is diagonal.
    """
    found = {}
    for value, width in activations:
        known = guessed(value, width)
        if not isinstance(known, str):
            reach, power = known
            found[value] = Statistics(_ROWS, np.diag(power * np.float32(_ROWS)), reach)
    return found
