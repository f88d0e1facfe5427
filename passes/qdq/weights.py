"""Constant weights as int8 codes behind a DequantizeLinear: symmetric, one scale for each output channel or for all."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import LEAST_SCALE, Array, QParams
from qcompile.passes.formats.base import drop_weight
from qcompile.passes.graph import add_initializer, insert_before, stem
from qcompile.passes.linears import Linear, as_linear, constant
from qcompile.passes.qdq.biases import least_scales
from qcompile.passes.qdq.providers import Rule
from qcompile.passes.spec import PerChannel, QuantSpec
from qcompile.passes.state import node_state, set_weight, weight_state

# Positive scales and no zero points: what integer kernels and TensorRT ask for.
SPEC = QuantSpec(8, PerChannel(1), symmetric=True, signed_scale=False)
# With 7 bits, sums of two products of uint8 and int8 stay within the 16 bits of x86 before VNNI.
_REDUCED = np.float32(2)
_FLOAT8_MOST = np.float32(448)
# So many times the least scale leave a bias 10 of its 30 bits.
_COARSE = np.float32(2.0**20)


@dataclass(frozen=True)
class WeightGrid:
    """How weights are quantized. float8: E4M3 numbers instead of int8. reduce_range: 7 of the 8 bits."""

    per_channel: bool = True
    reduce_range: bool = False
    float8: bool = False

    def __str__(self) -> str:
        bits = "float8" if self.float8 else "int7" if self.reduce_range else "int8"
        return f"{bits} {'per channel' if self.per_channel else 'per tensor'}"


@dataclass(frozen=True)
class Codes:
    """A quantized weight.

    codes: int8 or float8 numbers, shaped like it. scale: () or (channels,). axis: that of the channels.
    """

    codes: npt.NDArray[Any]
    scale: Array
    axis: int

    def dequantize(self) -> Array:
        """The float32 weight that the codes stand for."""
        shape = [1] * self.codes.ndim
        if self.scale.ndim:
            shape[self.axis] = -1
        return np.asarray(self.codes.astype(np.float32) * self.scale.reshape(shape), np.float32)


def quantize_weight(
    w: Array, axis: int, grid: WeightGrid, *, scale_dtype: npt.DTypeLike = np.float32, least: Array | None = None
) -> Codes:
    """Codes of a weight of any shape, its output channels along `axis`, for scales as `scale_dtype` holds them.

    least: the smallest scale of each channel, (channels,); that of channels of zeros.
    """
    spec = replace(SPEC, scale_dtype=scale_dtype)
    axis %= w.ndim
    moved = np.moveaxis(w, axis, -1)
    matrix = moved.reshape(-1, moved.shape[-1] if grid.per_channel else 1)
    if grid.float8:
        scale = spec.storable(np.abs(matrix).max(axis=0, keepdims=True) / _FLOAT8_MOST)
        inside = np.clip(matrix / scale, -_FLOAT8_MOST, _FLOAT8_MOST)  # beyond are NaN, and scales are rounded
        codes: npt.NDArray[Any] = inside.astype(ml_dtypes.float8_e4m3fn)
    else:
        qparams = spec.fit(matrix)
        if grid.reduce_range:
            qparams = QParams(qparams.scale * _REDUCED, qparams.zero_point)
        if least is not None:
            floor = least if grid.per_channel else least.max(keepdims=True)
            qparams = QParams(np.maximum(qparams.scale, floor), qparams.zero_point)
        scale, codes = qparams.scale, spec.project(matrix, qparams)
    codes = np.ascontiguousarray(np.moveaxis(codes.reshape(moved.shape), -1, axis))
    return freed(Codes(codes, scale.reshape(-1) if grid.per_channel else scale.reshape(()), axis), least)


def freed(quantized: Codes, least: Array | None) -> Codes:
    """The same with other scales for channels whose codes are all zero: they decode to zero with any scale.

    Their bias alone is what comes out of them, in codes of scale(activation) * scale: `least`, (channels,), is the
    scale that gives it most of 32 bits. Where it is 0 there is no bias, and the scale stays.
    """
    if least is None:
        return quantized
    least, zeros = _per_scale(quantized, least), ~_any_code(quantized)
    scale = np.where(zeros & (least > 0), np.maximum(least, LEAST_SCALE), quantized.scale).astype(np.float32)
    return replace(quantized, scale=scale)


def _blank(w: Array, axis: int, grid: WeightGrid) -> Codes:
    """Codes of the sizes that those of w have, all of them 0."""
    codes = np.broadcast_to(np.zeros((), ml_dtypes.float8_e4m3fn if grid.float8 else np.int8), w.shape)
    return Codes(codes, np.ones(w.shape[axis] if grid.per_channel else (), np.float32), axis)


def suits(quantized: Codes, least: Array | None) -> bool:
    """Whether a bias of these `least` scales (channels,) has codes that fit 32 bits, and enough of them."""
    if least is None:
        return True
    least, zeros = _per_scale(quantized, least), ~_any_code(quantized)
    coarse = zeros & (least > 0) & (quantized.scale > np.maximum(least * _COARSE, LEAST_SCALE))
    return not bool((quantized.scale < least).any() or coarse.any())


def _per_scale(quantized: Codes, least: Array) -> Array:
    return least if quantized.scale.ndim else np.asarray(least.max(initial=0.0), np.float32)


def _any_code(quantized: Codes) -> npt.NDArray[np.bool_]:
    """Whether a scale, () or (channels,), has codes other than zero."""
    if not quantized.scale.ndim:
        return np.asarray(quantized.codes.any())
    others = tuple(i for i in range(quantized.codes.ndim) if i != quantized.axis)
    return np.asarray(quantized.codes.any(axis=others))


def float_weight(node: ir.Node, rule: Rule) -> tuple[ir.Value, Array, int]:
    """(initializer, float32 weight as the node reads it, axis of its output channels) of a product."""
    if node.op_type == "MatMul":
        linear = as_linear(node)
        assert not isinstance(linear, str)
        return linear.weight, linear.read(), 1
    value = node.inputs[1]
    assert value is not None
    assert rule.axis is not None
    return value, np.asarray(constant(value).numpy(), np.float32), rule.axis


@dataclass
class Stored:
    """A weight in the graph: its codes and scale, and what they dequantize to."""

    quantized: Codes
    codes: ir.Value
    scale: ir.Value

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return constant(self.codes).nbytes + constant(self.scale).nbytes


def refused_codes(linear: Linear, grid: WeightGrid) -> str:
    """Why a `WeightStore` of this grid does not store codes that are chosen for a linear; empty where it does."""
    if node_state(linear.node).outliers is not None:
        return "some of its channels stay in float, the weights of the others are rounded to nearest"
    if linear.transposed:
        return "its weight is stored turned round, as a table of lookups is, and rounded to nearest"
    return "" if grid == WeightGrid() else f"weights are {grid}, and rounded to nearest"


class WeightStore:
    """Quantizes every weight once, however many nodes read it, unless their biases need other scales.

    dry: codes are blank, and no weight is read (`Pass.dry`).
    """

    def __init__(self, model: ir.Model, grid: WeightGrid, *, dry: bool = False) -> None:
        self.model, self.grid, self.dry = model, grid, dry
        self._stored: dict[tuple[ir.Value, bool, int], list[Stored]] = {}

    def store(
        self, value: ir.Value, w: Array, axis: int, *, transposed: bool = False, least: Array | None = None
    ) -> Stored:
        """The initializers of a weight; `transposed`: w is the transpose of what the value holds.

        least: the smallest scales (channels,) that a reader can do with; others of the weight keep theirs.
        """
        known = self._stored.setdefault((value, transposed, axis), [])
        found = next((stored for stored in known if self.dry or suits(stored.quantized, least)), None)
        if found is None:
            dtype = constant(value).dtype.numpy()
            if self.dry:
                quantized = _blank(w, axis % w.ndim, self.grid)
            else:
                quantized = self._suiting(self._compensated(value, transposed), w, axis, least, dtype)
            name = f"{value.name}.{'float8' if self.grid.float8 else 'int8'}"
            codes = add_initializer(self.model.graph, name, ir.tensor(quantized.codes))
            scale = add_initializer(self.model.graph, f"{name}.scale", ir.tensor(quantized.scale.astype(dtype)))
            found = Stored(quantized, codes, scale)
            known.append(found)
        return found

    def _suiting(self, known: Codes | None, w: Array, axis: int, least: Array | None, dtype: npt.DTypeLike) -> Codes:
        """The codes that were chosen before, or those of w, unless the reader's bias needs other scales."""
        half = np.float16 if dtype == np.float16 else np.float32
        quantized = freed(known or quantize_weight(w, axis, self.grid, scale_dtype=half), least)
        if suits(quantized, least):
            return quantized
        return quantize_weight(w, axis, self.grid, scale_dtype=half, least=least)

    def _compensated(self, value: ir.Value, transposed: bool) -> Codes | None:
        """The codes that `gptq` chose for a weight, where they are of this grid; see `refused_codes`."""
        codes = weight_state(value).codes
        known = codes.get(False)
        set_weight(value, codes={turned: own for turned, own in codes.items() if turned})
        if known is None or transposed or self.grid != WeightGrid() or known.spec.format != SPEC.format:
            return None
        return Codes(known.codes, known.qparams.scale[0], 1)

    def dequantized(self, node: ir.Node, rule: Rule, scale: Array | None = None) -> Stored:
        """Put a DequantizeLinear of codes where the node reads its float weight.

        scale: (), of the activation, where the bias of the node is to be int32; see `least_scales`.
        """
        value, w, axis = float_weight(node, rule)
        least = None if scale is None else least_scales(node, rule, scale, w.shape[axis])
        position = rule.weight or 1
        read = node.inputs[position]
        assert read is not None
        stored = self.store(value, w, axis, transposed=read is not value, least=least)
        name = f"{stem(stored.codes.name)}.{stem(node.name)}.dequantized"
        attributes = {"axis": stored.quantized.axis} if stored.quantized.scale.ndim else {}
        weight = insert_before(
            node, "DequantizeLinear", [stored.codes, stored.scale], attributes, name=name, output=name
        )
        weight.type, weight.shape = value.type, ir.Shape(w.shape)
        node.replace_input_with(position, weight)
        drop_weight(self.model, value, read)
        return stored


def importance(readers: Iterable[ir.Node]) -> Array | None:
    """What errors in each channel of an activation do to the products that read it: the sum of squared weights,
    relative to the largest.

    float32 (K,), or (C, 1, …) for the inputs of convolutions; None where no product of constant weight reads it.
    """
    found = [own for node in readers if (own := _row_power(node)) is not None]
    if not found or any(own.shape != found[0].shape for own in found):
        return None
    power = np.sum(found, axis=0)
    return np.asarray(power / max(float(power.max(initial=0.0)), np.finfo(np.float64).tiny), np.float32)


def _row_power(node: ir.Node) -> npt.NDArray[np.float64] | None:
    if node.op_type == "MatMul" and not isinstance(linear := as_linear(node), str):
        return np.asarray(_squares(linear.read()).sum(axis=1))
    weight = node.inputs[1] if node.op_type == "Conv" else None
    if weight is None or weight.const_value is None:
        return None
    w = np.asarray(constant(weight).numpy(), np.float32)
    groups, outputs, per_group = node.attributes.get_int("group", 1), w.shape[0], w.shape[1]
    power = _squares(w).reshape(groups, outputs // groups, per_group, -1).sum(axis=(1, 3))
    return np.asarray(power.reshape(-1, *[1] * (w.ndim - 2)))


def _squares(w: Array) -> npt.NDArray[np.float64]:
    return np.square(w, dtype=np.float64)  # those of 1e20 are none in float32
