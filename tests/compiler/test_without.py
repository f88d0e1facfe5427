"""A compile without one of the small passes of `prepare`: the numbers hold all the same, or one line says why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs.table import Feeds, Graph, sqnr

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.models.tiny import tiny_branch, tiny_conv, tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.prepare.order import SMALL

LEAST = {"pack": 12, "qdq": 18}


def _run(path: Path, feeds: Feeds) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return list(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds))


def _of_all_kinds() -> Graph:
    """One graph on which most of the small passes do something: a lookup, products in six forms, a convolution."""
    make = Graph()
    make.opsets[""] = 21
    table = make.floats(64, 32, scale=1.0)
    ids = make.input("b", 6, dtype=np.int64, draw=lambda random, shape: random.integers(0, 64, shape))
    h = make.one("Identity", make.one("Gather", table, ids))
    one, shape = make.constant(np.float32(1)), make.constant(np.array([-1, 32]))
    products = [
        make.one("Mul", make.linear(h, 32), one),
        make.one("Einsum", h, make.floats(32, 32), equation="bsk,kn->bsn"),
        make.one("MatMul", h, make.constant(make.random.standard_normal((1, 32, 32)).astype("f") / 6)),
        make.one("MatMul", h, make.one("Transpose", make.floats(32, 32), perm=[1, 0])),
        make.one("FusedMatMul", h, make.floats(32, 32), domain="com.microsoft"),
    ]
    flat = make.one("Gemm", make.one("Reshape", h, shape), make.floats(32, 32), make.floats(32))
    size = make.one("Shape", h)
    products.append(make.one("Reshape", flat, size))
    h = make.one("Sum", *products)
    gate = make.one("Clip", make.one("Add", h, make.constant(np.float32(3))), make.constant(np.float32(0)),
        make.constant(np.float32(6)))  # fmt: skip
    h = make.one("Div", make.one("Mul", h, gate), make.constant(np.float32(6)))
    h = make.one("Mul", h, make.one("Reciprocal", make.one("Exp", make.one("Tanh", h))))
    image = make.one("Unsqueeze", h, make.constant(np.array([1])))
    conv = make.one("Conv", image, make.floats(2, 1, 3, 3, scale=0.3), pads=[1, 1, 1, 1])
    conv = make.one("Mul", conv, make.floats(2, 1, 1, scale=1.0))
    h = make.one("Add", h, make.one("ReduceMean", conv, make.constant(np.array([1])), keepdims=0))
    weights = {c.name: onnx.numpy_helper.to_array(c) for c in make.constants}
    make.output(make.one("MatMul", h, make.constant(np.ascontiguousarray(weights[table].T) / np.float32(1))))
    return make


def _check(source: Path, feeds: Callable[[int], Feeds], passes: str, without: str, folder: Path) -> None:
    """The compiled model is within the usual of the source, or is refused in a line that says what was missed."""
    data = [folder / f"{seed}.npz" for seed in range(3)]
    for seed, path in enumerate(data):
        np.savez(path, **feeds(seed))
    output = folder / "o.onnx"
    recipe = Recipe(passes=parse_passes(f"prepare(without={without}),{passes}"), group_size=32, min_coverage=0)
    report, refusal = None, ""
    try:
        report = compile_model(source, recipe, output=output, calibration=Calibration([str(path) for path in data]))
    except UserError as error:
        refusal = str(error)
    if report is None:
        assert SMALL[without].ground
        assert f"prepare(without={without})" in refusal
        return
    assert any(d.detail["by"] == without and d.action == "skipped" for d in report.decisions["prepare"])
    unseen = feeds(1000)
    assert sqnr(_run(source, unseen), _run(output, unseen)) >= LEAST[passes]


@pytest.mark.parametrize("without", SMALL)
def test_without_one_small_pass(without: str, tmp_path: Path) -> None:
    make = _of_all_kinds()
    proto = make.model()
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "m.onnx")
    _check(tmp_path / "m.onnx", make.feeds, "pack", without, tmp_path)


def _feeds(model: ir.Model) -> Callable[[int], Feeds]:
    def feeds(seed: int) -> Feeds:
        random, made = np.random.default_rng(seed), dict[str, Any]()
        for value in model.graph.inputs:
            shape = [size if isinstance(size, int) else 6 for size in value.shape or ()]
            dtype = ir.DataType(value.dtype or 0).numpy()
            low = 1 if "mask" in str(value.name) else 0
            numbers = random.standard_normal(shape) if dtype.kind == "f" else random.integers(low, 2, shape)
            made[str(value.name)] = np.asarray(numbers).astype(dtype)
        return made

    return feeds


@pytest.mark.slow
@pytest.mark.parametrize("passes", LEAST)
@pytest.mark.parametrize("build", [lambda: tiny_decoder(layers=1), tiny_branch, lambda: tiny_conv(opset=21)])
@pytest.mark.parametrize("without", SMALL)
def test_real_shapes_without_one_small_pass(
    without: str, build: Callable[[], ir.Model], passes: str, tmp_path: Path
) -> None:
    model = build()
    ir.save(model, tmp_path / "m.onnx")
    _check(tmp_path / "m.onnx", _feeds(model), passes, without, tmp_path)


def test_what_is_left_in_float_for_it_is_refused(tmp_path: Path) -> None:
    """No format is for the weights of a Gemm."""
    make = Graph()
    make.opsets[""] = 21
    make.output(make.one("Gemm", make.linear(make.input(4, 64), 32, 64), make.floats(32, 64)))
    proto = make.model()
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "m.onnx")
    for passes in ("pack", "prepare(without=split_gemms),pack"):
        recipe = Recipe(passes=parse_passes(passes), group_size=32)
        if passes == "pack":
            assert compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx").coverage == 1
            continue
        with pytest.raises(UserError, match=r"only 50\.0% of .* no packed format for Gemm weights"):
            compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx")
