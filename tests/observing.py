"""Observers driven as the compiler drives them: through a graph in ONNX Runtime, batch by batch. And distributions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import helper

from qcompile.passes.observers.base import Observer
from qcompile.passes.spec import ActivationSpec
from qcompile.runtime.sessions import run, session

Own = TypeVar("Own", bound=Observer)

UINT8, INT8_SYM = ActivationSpec(), ActivationSpec(ir.DataType.INT8, True)
UINT16, FLOAT8 = ActivationSpec(ir.DataType.UINT16), ActivationSpec(ir.DataType.FLOAT8E4M3FN, True)
GRIDS = [UINT8, INT8_SYM, ActivationSpec(ir.DataType.INT8), UINT16, FLOAT8]


class Int4Sym(ActivationSpec):
    """A grid of 15 codes, for tests: its best ranges are far inside the extremes."""

    qmin, qmax = -7, 7


INT4_SYM = Int4Sym(ir.DataType.INT8, True)


def observe(observer: Own, batches: Iterable[npt.NDArray], dtype: type = np.float32) -> Own:
    """The observer behind the batches; its activation "x" is the output of a node."""
    given = helper.make_tensor_value_info("x_in", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
    graph = helper.make_graph([helper.make_node("Neg", ["x_in"], ["x"])], "g", [given], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    observer.append(model.graph)
    names = [output.name for output in model.graph.output]
    made = session(model.SerializeToString(), threads=1)
    for batch in batches:
        outputs = run(made, names, {"x_in": np.asarray(-np.asarray(batch), dtype)})
        observer.update(dict(zip(names, outputs, strict=True)))
    return observer


@dataclass(frozen=True, eq=False)
class Known:
    """A distribution that is symmetric about 0, by its formulas. quantile: of shares (n,) in (0, 1)."""

    density: Callable[[npt.NDArray], npt.NDArray]
    below: Callable[[npt.NDArray], npt.NDArray]
    quantile: Callable[[npt.NDArray], npt.NDArray]

    def sample(self, count: int) -> npt.NDArray[np.float32]:
        """Its quantiles at evenly spaced shares, shuffled: a sample with hardly any noise."""
        return _sample(self, count)


@cache
def _sample(known: Known, count: int) -> npt.NDArray[np.float32]:
    values = known.quantile((np.arange(count) + 0.5) / count)
    return np.random.default_rng(0).permutation(values).astype(np.float32)


def _normal_quantile(share: npt.NDArray) -> npt.NDArray:
    return np.array([NormalDist().inv_cdf(p) for p in share])


def _normal_below(x: npt.NDArray) -> npt.NDArray:
    return np.vectorize(NormalDist().cdf)(x)


def _laplace_quantile(share: npt.NDArray) -> npt.NDArray:
    return -np.sign(share - 0.5) * np.log(1 - 2 * np.abs(share - 0.5))


def _t4_quantile(share: npt.NDArray) -> npt.NDArray:
    """Shaw 2006, Sampling Student's T distribution, for 4 degrees of freedom."""
    root = np.sqrt(4 * share * (1 - share))
    return np.sign(share - 0.5) * 2 * np.sqrt(np.maximum(np.cos(np.arccos(root) / 3) / root - 1, 0))


def _t4_below(x: npt.NDArray) -> npt.NDArray:
    return 0.5 + 3 / 8 * x / np.sqrt(1 + x * x / 4) * (1 - x * x / (1 + x * x / 4) / 12)


KNOWN = {
    "normal": Known(lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi), _normal_below, _normal_quantile),
    "laplace": Known(
        lambda x: np.exp(-np.abs(x)) / 2,
        lambda x: np.where(x < 0, np.exp(-np.abs(x)) / 2, 1 - np.exp(-np.abs(x)) / 2),
        _laplace_quantile,
    ),
    "t4": Known(lambda x: 3 / 8 * (1 + x * x / 4) ** -2.5, _t4_below, _t4_quantile),
}
