"""compiler/mixed/work.py: multiplications against their definition, and numbers that are read and given."""

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.mixed.work import _NUMBER, work_of
from qcompile.models.tiny.build import Builder


def _work(model: ir.Model, **feeds: Any) -> dict[str, int]:
    rows = next(iter(feeds.values())).shape[0]
    return work_of(model, [str(node.name) for node in model.graph], Batch(feeds, rows), "cpu")


def _weight(b: Builder, *shape: int) -> ir.Value:
    return b.weight("w", np.ones(shape, np.float32))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_with_a_weight_of_free_rows(rows: int) -> None:
    b = Builder(opset=21)
    y = b.Add(b.MatMul(b.input("x", b.dtype, ["rows", 5, 8]), _weight(b, 8, 6), name="product"), 1.0, name="sum")
    found = _work(b.model({"y": y}), x=np.zeros((rows, 5, 8), np.float32))
    assert found == {
        "product": rows * 5 * 8 * 6 + _NUMBER * rows * 5 * (8 + 6),
        "sum": _NUMBER * 2 * rows * 5 * 6,
    }


def test_a_product_of_two_activations() -> None:
    b = Builder(opset=21)
    y = b.MatMul(b.input("x", b.dtype, [2, 4, 8]), b.input("z", b.dtype, [2, 8, 3]), name="scores")
    found = _work(b.model({"y": y}), x=np.zeros((2, 4, 8), np.float32), z=np.zeros((2, 8, 3), np.float32))
    assert found == {"scores": 2 * 4 * 8 * 3 + _NUMBER * (2 * 4 * 8 + 2 * 8 * 3 + 2 * 4 * 3)}


@pytest.mark.parametrize(("transposed", "shape"), [(0, (4, 8)), (1, (8, 4))])
def test_a_gemm(transposed: int, shape: tuple[int, int]) -> None:
    b = Builder(opset=21)
    y = b.Gemm(b.input("x", b.dtype, list(shape)), _weight(b, 8, 3), transA=transposed, name="gemm")
    found = _work(b.model({"y": y}), x=np.zeros(shape, np.float32))
    assert found == {"gemm": 4 * 8 * 3 + _NUMBER * (32 + 12)}


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_convolutions_of_groups_and_strides(groups: int, stride: int) -> None:
    b = Builder(opset=21)
    x = b.input("x", b.dtype, ["n", 4, "h", "w"])
    y = b.Conv(x, _weight(b, 8, 4 // groups, 3, 3), group=groups, strides=[stride] * 2, pads=[1] * 4, name="conv")
    side = (6 + stride - 1) // stride
    given, read = 2 * 8 * side * side, 2 * 4 * 6 * 6
    found = _work(b.model({"y": y}), x=np.zeros((2, 4, 6, 6), np.float32))
    assert found == {"conv": given * (4 // groups) * 9 + _NUMBER * (given + read)}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_multiplies_each_number_that_it_reads(groups: int) -> None:
    b = Builder(opset=21)
    x = b.input("x", b.dtype, [1, 4, 5, 5])
    y = b.ConvTranspose(x, _weight(b, 4, 6 // groups, 2, 2), group=groups, strides=[2, 2], name="up")
    given, read = 6 * 10 * 10, 4 * 5 * 5
    found = _work(b.model({"y": y}), x=np.zeros((1, 4, 5, 5), np.float32))
    assert found == {"up": read * prod((6 // groups, 2, 2)) + _NUMBER * (given + read)}
