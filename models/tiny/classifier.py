"""An image classifier: a trunk of convolutions, pooled into many channels that one linear reads."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import Array, linear_weight


def tiny_classifier(
    *, channels: int = 1280, classes: int = 1000, seed: int = 0, gemm: bool = True, opset: int = 17
) -> ir.Model:
    """image (batch, 3, 32, 32) to scores (batch, classes): three Conv, the last to `channels`, pooled to one number
    each, and the classifier, a Gemm or MatMul + Add with that many rows.

    As in trained trunks the pooled channels are correlated (they come from 32), of uneven size, and some fire rarely.
    """
    b, rng = Builder(opset=opset), np.random.default_rng(seed)

    def conv(x: ir.Value, name: str, n: int, k: int, size: int, stride: int) -> ir.Value:
        w = rng.standard_normal((n, k, size, size), dtype=np.float32) * np.float32(1.4 / (size * np.sqrt(k)))
        if n == channels:
            w *= np.exp(0.7 * rng.standard_normal((n, 1, 1, 1))).astype(np.float32)
        bias = (rng.standard_normal(n) * 0.3 - (0.6 if n == channels else 0.0)).astype(np.float32)
        pads = [size // 2] * 4
        y = b.Conv(x, b.weight(f"{name}.weight", w), b.weight(f"{name}.bias", bias), name=name, pads=pads,
                   strides=[stride, stride])  # fmt: skip
        return b.Relu(y)

    x = b.input("image", b.dtype, ["batch", 3, 32, 32])
    y = conv(conv(conv(x, "conv_0", 16, 3, 3, 2), "conv_1", 32, 16, 3, 2), "conv_2", channels, 32, 1, 1)
    y = b.Flatten(b.GlobalAveragePool(y), axis=1)
    w, bias = linear_weight(rng, channels, classes), (0.1 * rng.standard_normal(classes)).astype(np.float32)
    if gemm:
        y = b.Gemm(y, b.weight("classifier.weight", w), b.weight("classifier.bias", bias), name="classifier")
    else:
        y = b.MatMul(y, b.weight("classifier.weight", w), name="classifier")
        y = b.Add(y, b.weight("classifier.bias", bias))
    return b.model({"scores": y})


def pictures(rng: np.random.Generator, count: int, *, size: int = 32) -> Array:
    """float32 (count, 3, size, size): smooth blobs of a few kinds, each picture with a brightness of its own."""
    grid = np.linspace(-1, 1, size)
    found: npt.NDArray[np.float64] = np.zeros((count, 3, size, size))
    for picture in found:
        for _ in range(int(rng.integers(2, 5))):
            (y, x), width = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.6)
            blob = np.exp(-((grid[:, None] - y) ** 2 + (grid[None, :] - x) ** 2) / width**2)
            picture += rng.standard_normal((3, 1, 1)) * blob
        picture *= np.exp(0.5 * rng.standard_normal())
        picture += 0.05 * rng.standard_normal(picture.shape)
    return found.astype(np.float32)
