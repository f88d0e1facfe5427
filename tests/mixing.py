"""What the tests of mixed precision share: models with a node that cannot be integer, and their files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny import tiny_conv, tiny_decoder

BAD = "lm_head"


def _scale(model: ir.Model, name: str, where: Any, factor: float) -> None:
    value = model.graph.initializers[name]
    array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
    array[where] *= factor
    value.const_value = ir.tensor(array, name=name)


def bad_decoder(factor: float = 300.0) -> ir.Model:
    """A decoder whose BAD node multiplies an input channel by `factor`, which the norm before made so much smaller.

    The function stays the same, but the 8-bit grids of that node have no room for the other channels.
    """
    model = tiny_decoder(layers=1, outliers=False, tied=False)
    _scale(model, "model.norm.weight", np.s_[3], 1 / factor)
    _scale(model, f"{BAD}.weight", np.s_[3], factor)
    return model


def bad_conv(factor: float = 300.0) -> ir.Model:
    """A network of two Convs, a MatMul and a Gemm, where channel 2 between the Convs is as in `bad_decoder`."""
    model = tiny_conv(opset=21)
    _scale(model, "conv_0.weight", np.s_[2], 1 / factor)
    second = next(node for node in model.graph if node.name == "conv_1").inputs[1]
    assert second is not None
    _scale_constant(second, np.s_[:, 2], factor)
    return model


def _scale_constant(value: ir.Value, where: Any, factor: float) -> None:
    node = value.producer()
    if node is None:
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[where] *= factor
        value.const_value = ir.tensor(array, name=value.name)
        return
    array = np.array(node.attributes["value"].as_tensor().numpy())
    array[where] *= factor
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def images(folder: Path, count: int = 3) -> list[str]:
    """Files of inputs for `bad_conv`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.npz" for i in range(count)]
    for path in paths:
        np.savez(path, image=rng.standard_normal((2, 3, 12, 12)).astype(np.float32))
    return [str(path) for path in paths]
