"""compiler/files/one_read.py: what is found does not depend on how bytes are cut, nor on where tensors lie."""

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.files import load, one_read
from qcompile.compiler.files.load import check_finite, hash_and_check, load_model, model_hash, save_model
from qcompile.compiler.files.one_read import numbers_of, read_file
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.tensors import LARGEST

_TYPES = {
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.FLOAT: np.float32,
    ir.DataType.DOUBLE: np.float64,
}
_ODD = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -6e4)


def _drawn(seed: int, size: int, kind: ir.DataType) -> Any:
    """Numbers of all magnitudes, odd ones among some of them."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(size) * 10.0 ** rng.integers(-6, 4)
    if seed % 2:
        array[rng.integers(0, size, 1 + seed % 7)] = rng.choice(_ODD, 1 + seed % 7)
    with np.errstate(over="ignore"):
        return (-np.abs(array) if seed % 5 == 0 else array).astype(_TYPES[kind])


def _wanted(array: Any) -> tuple[Any, ...]:
    wide = array.astype(np.float64)
    largest = np.nan if np.isnan(wide).any() else np.abs(wide).max()
    return int(np.isnan(wide).sum()), int(np.isinf(wide).sum()), int((wide == -np.inf).sum()), largest


def _found(numbers: one_read.Numbers) -> tuple[Any, ...]:
    return numbers.nans, numbers.infs, numbers.negative, numbers.largest


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(sorted(_TYPES)), st.integers(1, 400), st.integers(0, 40), st.integers(0, 999)),
        min_size=1,
        max_size=6,
    ),
    piece=st.sampled_from([8, 64, 1 << 19]),
    tail=st.integers(0, 30),
)
def test_a_file_tells_of_its_tensors_what_each_tells_by_itself(
    tmp_path_factory: pytest.TempPathFactory, parts: Any, piece: int, tail: int
) -> None:
    """Behind gaps of any size, in pieces of any size; two tensors of the same bytes know the same."""
    file, tensors, arrays = tmp_path_factory.mktemp("read") / "w.data", list[ir.ExternalTensor](), list[Any]()
    content = b""
    for kind, size, gap, seed in parts:
        array = _drawn(seed, size, kind)
        content += bytes(gap)
        for _ in range(1 + seed % 2):
            shape = ir.Shape((size,))
            tensors.append(ir.ExternalTensor(str(file), len(content), array.nbytes, kind, shape=shape, name="w"))
            arrays.append(array)
        content += array.tobytes()
    file.write_bytes(content + bytes(tail))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_read, "_PIECE", piece)
        digest, found = read_file(file, tensors[::-1])
    assert digest == hashlib.sha256(content + bytes(tail)).digest()
    assert found.keys() == {id(tensor) for tensor in tensors}
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_equal(_found(found[id(tensor)]), _wanted(array))
        np.testing.assert_equal(_found(numbers_of(tensor)), _wanted(array))


def test_a_tensor_within_anothers_bytes_is_left_to_be_read_by_itself(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.float32)
    (tmp_path / "w").write_bytes(array.tobytes())
    whole, inner, turned = (
        ir.ExternalTensor(str(tmp_path / "w"), at, 4 * size, kind, shape=ir.Shape((size * 4 // width,)), name="w")
        for at, size, kind, width in (
            (0, 64, ir.DataType.FLOAT, 4),
            (8, 4, ir.DataType.FLOAT, 4),
            (0, 64, ir.DataType.FLOAT16, 2),
        )
    )
    digest, found = read_file(tmp_path / "w", [inner, turned, whole])
    assert digest == hashlib.sha256(array.tobytes()).digest()
    assert len(found) == 1
    assert not found.keys() & {id(inner)}


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(100))
    tensor = ir.ExternalTensor(str(tmp_path / "w"), 0, 400, ir.DataType.FLOAT, shape=ir.Shape((100,)), name="w")
    with pytest.raises(UserError, match="became shorter while it was read"):
        read_file(tmp_path / "w", [tensor])


def test_a_model_on_disk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a data file is read beside that; the hash is that of the files, tensors know their largest."""
    save_model(tiny_decoder(hidden=64), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    single = []
    monkeypatch.setattr(load, "numbers_of", lambda tensor: single.append(tensor) or numbers_of(tensor))
    assert hash_and_check(tmp_path / "m.onnx", model) == model_hash(tmp_path / "m.onnx")
    assert not any(isinstance(tensor, ir.ExternalTensor) for tensor in single)
    outside = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert outside
    for tensor in outside:
        assert tensor.meta[LARGEST] == np.abs(tensor.numpy()).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_as_by_a_check_alone(tmp_path: Path, bad: float) -> None:
    save_model(tiny_decoder(hidden=64), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    weight = next(
        value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor) and len(value.shape or ()) == 2
    )
    with open(weight.path, "r+b") as file:
        file.seek(weight.offset or 0)
        file.write(np.float32(bad).tobytes())
    told = []
    for check in (check_finite, lambda own: hash_and_check(tmp_path / "m.onnx", own)):
        with pytest.raises(UserError) as raised:
            check(load_model(tmp_path / "m.onnx"))
        told.append(str(raised.value))
    assert told[0] == told[1]
    assert f"holds {int(np.isnan(bad))} NaN and {int(np.isinf(bad))} Inf" in told[0]
