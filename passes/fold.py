"""Moving a channel factor from an activation into constants: the value is divided by it, its linears multiply it back.

(v / s) (s * W) = v W for every positive s (K,). The division goes into constants before v, so no operator is added.
Used by `smooth` (Xiao et al. 2022) and `awq` (Lin et al. 2023), which choose s.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.absorb import Absorber
from qcompile.passes.affine import Array
from qcompile.passes.base import Region
from qcompile.passes.linears import Linear, constant
from qcompile.passes.pairs import Pair

# float16 holds 6e-8 .. 6.5e4, below 6e-5 with fewer bits. The largest magnitude of every scaled channel stays between
# these two, which leaves room for the smaller entries beside it.
_HALF_MIN, _HALF_MAX = 1e-3, 3e4


def fold(pair: Pair, factor: Array, region: Region) -> Array:
    """Divide the pair's value by `factor` (K,) and multiply the rows of its linears by it; the statistics follow.

    Returns the factor that was applied: in float16 models it is clipped so that no constant leaves the type's range.
    """
    factor = _checked(pair, factor)
    factor = _within_half(pair, factor, region)
    if pair.absorbers:
        _divide(pair, factor, region.model.graph)
        if pair.value in region.statistics:
            region.statistics[pair.value].rescale(factor)
    else:
        _insert(pair, factor, region)
    scaled: set[ir.Value] = set()
    for linear in pair.linears:
        if linear.weight not in scaled:
            scaled.add(linear.weight)
            rows = factor if linear.transposed else factor[:, None]
            _store(linear.weight, _read(linear.weight) * rows)
    return factor


def _checked(pair: Pair, factor: Array) -> Array:
    factor = np.asarray(factor, dtype=np.float32)
    if factor.shape != pair.channels.shape:
        raise ValueError(f"{pair.name} has {pair.channels.size} channels, got factors of shape {factor.shape}")
    if not np.isfinite(factor).all() or factor.min() < np.finfo(np.float32).tiny:
        raise ValueError(f"factors must be positive and finite, got {factor.min()} .. {factor.max()}")
    if (pair.shared.pool_max(factor) != factor).any():
        raise ValueError(f"channels of {pair.name} that share a producer's channel need one factor")
    return factor


def _divide(pair: Pair, factor: Array, graph: ir.Graph) -> None:
    """Divide the constants before the value, each in a private copy where somebody else reads it too."""
    by_channel = np.ones(_producer_channels(pair), np.float32)
    by_channel[pair.channels] = factor
    for absorber in pair.absorbers:
        value = absorber.constant
        data = _read(value)
        if not data.any():
            continue  # zeros absorb everything; a shared zero beta stays shared
        if len(value.uses()) > 1 or value.is_graph_output():
            value = _private_copy(value, graph)
            absorber.node.replace_input_with(absorber.position, value)
        _store(value, data / by_channel[absorber.index])


def _private_copy(value: ir.Value, graph: ir.Graph) -> ir.Value:
    number = 1
    while (name := f"{value.name}_{number}") in graph.initializers:
        number += 1
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    return copy


def _insert(pair: Pair, factor: Array, region: Region) -> None:
    """An explicit Mul(value, 1 / factor) before the linears: the only rewrite here that costs run time."""
    first = pair.linears[0].node
    dtype = constant(pair.linears[0].weight).dtype
    # Readers in other regions may have got a Mul of their own.
    others = sum(use.node.name is not None and use.node.name.endswith("_scale_input") for use in pair.value.uses())
    name = f"{pair.name}_{others}" if others else pair.name
    inverse = ir.Value(name=f"{name}_inverse_factor", shape=ir.Shape(factor.shape), type=ir.TensorType(dtype))
    _store(inverse, 1 / factor, dtype=dtype)
    region.model.graph.register_initializer(inverse)
    scaled = ir.Value(name=f"{name}_scaled", shape=pair.value.shape, type=pair.value.type)
    node = ir.Node("", "Mul", [pair.value, inverse], outputs=[scaled], name=f"{first.name}_scale_input")
    region.model.graph.insert_before(first, node)
    region.nodes.insert(region.nodes.index(first), node)
    for linear in pair.linears:
        linear.node.replace_input_with(0, scaled)
    statistics = region.statistics.get(pair.value)
    if statistics is not None:
        region.statistics[scaled] = replace(statistics)
        region.statistics[scaled].rescale(factor)


def _within_half(pair: Pair, factor: Array, region: Region) -> Array:
    """The factor clipped so that float16 constants and activations neither overflow nor vanish."""
    if constant(pair.linears[0].weight).dtype != ir.DataType.FLOAT16:
        return factor
    low, high = np.zeros_like(factor), np.full_like(factor, _HALF_MAX)
    for linear in pair.linears:  # grows with the factor
        peak = pair.shared.pool_max(row_peaks(linear))
        low, high = np.maximum(low, _shrinkable(peak)), np.minimum(high, _growable(peak))
    for absorber in pair.absorbers:  # shrinks with it
        peak = _absorber_peaks(pair, absorber)
        low, high = np.maximum(low, 1 / _growable(peak)), np.minimum(high, 1 / _shrinkable(peak))
    statistics = region.statistics.get(pair.value)
    if statistics is not None:
        low = np.maximum(low, 1 / _growable(pair.shared.pool_max(statistics.absmax)))
    return np.clip(factor, np.minimum(low, 1), np.maximum(high, 1)).astype(np.float32)


def _growable(peak: Array) -> Array:
    return np.asarray(_HALF_MAX / np.maximum(peak, 1), np.float32)


def _shrinkable(peak: Array) -> Array:
    return np.asarray(np.clip(_HALF_MIN / np.maximum(peak, _HALF_MIN / _HALF_MAX), 1 / _HALF_MAX, 1), np.float32)


def row_peaks(linear: Linear) -> Array:
    """The largest magnitude in each row of the weight, float32 (K,)."""
    w = linear.read()
    return np.asarray(np.maximum(w.max(axis=1), -w.min(axis=1)))


def _absorber_peaks(pair: Pair, absorber: Absorber) -> Array:
    """The largest magnitude that each channel of the value meets in the constant, float32 (K,)."""
    data, index = np.broadcast_arrays(np.abs(_read(absorber.constant)), absorber.index)
    peaks = np.zeros(_producer_channels(pair), np.float32)
    np.maximum.at(peaks, index.reshape(-1), data.reshape(-1))
    return peaks[pair.channels]


def _producer_channels(pair: Pair) -> int:
    return 1 + int(max(absorber.index.max() for absorber in pair.absorbers))


def _read(value: ir.Value) -> npt.NDArray[np.floating]:
    stored = constant(value)
    return stored.numpy().astype(np.float64 if stored.dtype == ir.DataType.DOUBLE else np.float32)


def _store(value: ir.Value, data: npt.NDArray[np.floating], dtype: ir.DataType | None = None) -> None:
    """Set an initializer's tensor, in memory, in its own element type."""
    dtype = dtype or constant(value).dtype
    value.const_value = ir.tensor(np.ascontiguousarray(data, dtype=dtype.numpy()), dtype=dtype, name=value.name)
    value.shape = ir.Shape(data.shape)
