"""Models with float inputs: every way in which exporters store the weight of a linear."""

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import Array, linear_weight


def tiny_mlp(*, k: int = 48, hidden: int = 64, seed: int = 0, opset: int = 21, dtype: str = "fp32") -> ir.Model:
    """x (batch, k) to y (batch, 10), through eight linears:

    1. plain: MatMul + Add   2. trans_b: Gemm with a (N, K) weight, alpha and beta   3. trans_a: Gemm of a transposed
    activation   4. and 5. shared_a, shared_b: two Gemms that share one initializer   6. constant: MatMul with its
    weight in a Constant node   7. fed: MatMul whose (N, K) weight passes through a Transpose   8. no_bias: Gemm without
    C, transB, its weight in a Constant node.
    """
    b, rng = Builder(opset=opset, dtype=dtype), np.random.default_rng(seed)

    def weight(n: int, m: int) -> Array:
        return linear_weight(rng, n, m, gain=1.5)

    def bias(n: int) -> ir.Value:
        return b.weight(f"bias_{len(b.initializers)}", (0.3 * rng.standard_normal(n)).astype(np.float32))

    x = b.input("x", b.dtype, ["batch", k])
    y = b.Relu(b.Add(b.MatMul(x, b.weight("plain.weight", weight(k, hidden)), name="plain"), bias(hidden)))
    w = b.weight("trans_b.weight", weight(hidden, hidden).T.copy())
    y = b.Relu(b.Gemm(y, w, bias(hidden), name="trans_b", transB=1, alpha=0.5, beta=2.0))
    w = b.weight("trans_a.weight", weight(hidden, hidden))
    y = b.Relu(b.Gemm(b.Transpose(y, perm=[1, 0]), w, bias(hidden), name="trans_a", transA=1))
    shared = b.weight("shared.weight", weight(hidden, hidden))
    y = b.Relu(b.Gemm(y, shared, bias(hidden), name="shared_a"))
    y = b.Relu(b.Gemm(y, shared, bias(hidden), name="shared_b", transB=1))
    y = b.Relu(b.MatMul(y, b.constant(weight(hidden, hidden)), name="constant"))
    fed = b.weight("fed.weight", weight(hidden, hidden).T.copy())
    y = b.Relu(b.MatMul(y, b.Transpose(fed, perm=[1, 0]), name="fed"))
    y = b.Gemm(y, b.constant(weight(hidden, 10).T.copy()), name="no_bias", transB=1)
    return b.model({"y": y})


def tiny_conv(*, seed: int = 0, opset: int = 11) -> ir.Model:
    """image (batch, 3, height, width) to scores (batch, 7): two Conv, a MatMul and a Gemm, weights in Constants."""
    b, rng = Builder(opset=opset), np.random.default_rng(seed)

    def kernel(n: int, m: int) -> Array:
        return np.float32(1 / np.sqrt(9 * m)) * rng.standard_normal((n, m, 3, 3), dtype=np.float32)

    x = b.input("image", b.dtype, ["batch", 3, "height", "width"])
    y = b.Relu(b.Conv(x, b.weight("conv_0.weight", kernel(16, 3)), name="conv_0", pads=[1, 1, 1, 1]))
    y = b.Conv(y, b.constant(kernel(32, 16)), name="conv_1", pads=[1, 1, 1, 1], strides=[2, 2])
    y = b.Flatten(b.GlobalAveragePool(b.Relu(y)), axis=1)
    y = b.MatMul(y, b.constant(linear_weight(rng, 32, 40, gain=2.0)), name="hidden")
    y = b.Add(y, b.constant(0.1 * rng.standard_normal(40)))
    y = b.Gemm(b.Relu(y), b.constant(linear_weight(rng, 40, 7)), b.constant(np.ones(7, "f4")), name="classifier")
    return b.model({"scores": y})


def tiny_branch(*, k: int = 32, seed: int = 0, opset: int = 21) -> ir.Model:
    """x (batch, k) and flag () to y (batch, k): a MatMul, then an If whose branches multiply by weights of their own
    and by the outer graph's one."""
    b, rng = Builder(opset=opset), np.random.default_rng(seed)
    x, flag = b.input("x", b.dtype, ["batch", k]), b.input("flag", ir.DataType.BOOL, [])
    outer = b.weight("outer.weight", linear_weight(rng, k, k))
    y = b.MatMul(x, outer, name="outer")

    def branch(name: str, weight: ir.Value | None) -> ir.Graph:
        own = [] if weight is not None else [ir.val(f"{name}.weight", const_value=ir.tensor(linear_weight(rng, k, k)))]
        node = ir.node("MatMul", [y, weight if weight is not None else own[0]], name=name)
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{name}.out", b.dtype, ir.Shape(["batch", k])
        return ir.Graph([], [out], nodes=[node], initializers=own, name=name)

    taken = b.If(flag, name="if", then_branch=branch("then", None), else_branch=branch("else", outer))
    return b.model({"y": b.Relu(taken)})
