"""What execution providers make of each operator between DequantizeLinear and QuantizeLinear.

The CPU columns were measured on ONNX Runtime 1.32 (x86-64, opset 21): tests/passes/qdq/test_providers.py proves every
row. The other columns are read from documents, cited in docs/qdq.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

Provider = Literal["cpu", "cuda", "tensorrt", "qnn"]
Output = Literal["required", "optional", "same"]
Precision = Literal["int8", "passes", "float"]


@dataclass(frozen=True)
class Rule:
    """How one operator is quantized, by positions of its inputs, and what comes of it.

    `cpu`: the operator that takes the place of it and of its Q and DQ; its own name where codes simply pass through;
    "float" where Q, DQ and the operator stay as they are.
    `output`: "required": float, unless a QuantizeLinear is the only reader of its output. "optional": without one the
    result is float32 (`cpu_float` then takes its place), all the same computed from codes. "same": the QuantizeLinear
    behind must have the scale and zero point of the DequantizeLinear before; no rounding is added.
    `activations`: the inputs that must come out of a DequantizeLinear, one scale for the tensor; "all" of a variadic
    operator. A constant among them is quantized like an activation, unless it stands at `weight`.
    `weight`: the input that may be a constant of int8 codes, with one scale, or one for each index of `axis`.
    `bias`: the input that may be int32 codes of scale(activation) * scale(weight), zero point 0.
    `slower`: on the CPU it took longer than the float operator, with the Q and DQ that the latter needs (docs/qdq.md).
    `cuda`, `tensorrt`: "int8"; "passes": codes pass through; "float".
    """

    cpu: str
    output: Output = "required"
    activations: tuple[int, ...] | Literal["all"] = (0,)
    weight: int | None = None
    axis: int | None = None
    bias: int | None = None
    cpu_float: str | None = None
    slower: bool = False
    cuda: Precision = "float"
    tensorrt: Precision = "float"


@dataclass(frozen=True)
class Types:
    """What a provider wants of the codes; weights are int8 with zero point 0 for all of them.

    `activation`: the element type of activations. `symmetric`: their zero point must be 0. `bias`: whether int32 biases
    behind a DequantizeLinear are understood; where not, the bias stays float.
    """

    activation: ir.DataType
    symmetric: bool
    bias: bool


# uint8 on the CPU: an int8 value with two readers is not fused on x86-64, and uint8 by int8 is the fastest product.
TYPES: Mapping[Provider, Types] = MappingProxyType(
    {
        "cpu": Types(ir.DataType.UINT8, symmetric=False, bias=True),
        "cuda": Types(ir.DataType.INT8, symmetric=True, bias=False),
        "tensorrt": Types(ir.DataType.INT8, symmetric=True, bias=False),
        "qnn": Types(ir.DataType.UINT8, symmetric=False, bias=True),
    }
)

_PRODUCTS = {
    "MatMul": Rule(
        "QLinearMatMul", "optional", (0, 1), weight=1, axis=-1, cpu_float="MatMulIntegerToFloat", tensorrt="int8"
    ),
    "Gemm": Rule("QGemm", "optional", (0, 1), weight=1, axis=1, bias=2, cpu_float="QGemm", tensorrt="int8"),
    "Conv": Rule("QLinearConv", weight=1, axis=0, bias=2, tensorrt="int8"),
    "ConvTranspose": Rule("float", weight=1, axis=1, tensorrt="int8"),
}
_ELEMENTWISE = {
    "Add": Rule("QLinearAdd", activations=(0, 1), tensorrt="int8"),
    "Mul": Rule("QLinearMul", activations=(0, 1), tensorrt="int8"),
    "Concat": Rule("QLinearConcat", activations="all", tensorrt="passes"),
    "Where": Rule("QLinearWhere", activations=(1, 2)),
    "Sigmoid": Rule("QLinearSigmoid"),
    "LeakyRelu": Rule("QLinearLeakyRelu"),
    "Softmax": Rule("QLinearSoftmax", slower=True),
    "AveragePool": Rule("QLinearAveragePool", slower=True, tensorrt="int8"),
    "GlobalAveragePool": Rule("QLinearGlobalAveragePool", tensorrt="int8"),
}
# The same codes elsewhere, or some of them.
_MOVES: dict[str, Precision] = {
    "DepthToSpace": "float",
    "Expand": "float",
    "Flatten": "float",
    "Gather": "passes",
    "GatherElements": "passes",
    "MaxPool": "int8",
    "ReduceMax": "float",
    "ReduceMin": "float",
    "Reshape": "passes",
    "Resize": "float",
    "Slice": "passes",
    "Split": "float",
    "Squeeze": "passes",
    "Tile": "float",
    "Transpose": "passes",
    "Unsqueeze": "passes",
}

RULES: Mapping[str, Rule] = MappingProxyType(
    _PRODUCTS | _ELEMENTWISE | {name: Rule(name, "same", tensorrt=precision) for name, precision in _MOVES.items()}
)

# Tried between Q and DQ, and float on the CPU: Q and DQ around them only cost time and accuracy there.
FLOAT_ON_CPU = frozenset(
    {"Abs", "BatchNormalization", "Div", "Elu", "Erf", "Exp", "Gelu", "GlobalMaxPool", "HardSigmoid", "HardSwish"}
    | {"InstanceNormalization", "LayerNormalization", "Log", "Max", "Min", "Mish", "Neg", "PRelu", "Pad", "Pow"}
    | {"Reciprocal", "ReduceMean", "ReduceSum", "Relu", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
    | {"Softplus", "SpaceToDepth", "Sqrt", "Sub", "Tanh"}
)


def rule_of(node: ir.Node) -> Rule | str:
    """The rule of a node as its attributes make it, or why there is none."""
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return f"{node.op_type} is computed in float"
    attributes = node.attributes
    if node.op_type == "Resize":
        mode = attributes["mode"].as_string() if "mode" in attributes else "nearest"
        return rule if mode == "nearest" else f"Resize in mode {mode} is computed in float"
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return "MaxPool with indices is computed in float"
    if node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].as_int():
        return replace(rule, axis=0)
    return rule
