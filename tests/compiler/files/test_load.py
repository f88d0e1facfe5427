"""Every kind of bad file: one line that says what is wrong, and nothing loaded."""

import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.files.load import check_finite, check_output_path, load_model, model_hash, save_model
from qcompile.passes.errors import UserError


def _model(weight: np.ndarray | None = None, *, opset: int = 21, ir_version: int = 10) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
            g (float[N,8] x) => (float[N,64] y) {{ y = MatMul(x, w) }}"""
    )
    array = np.arange(512, dtype=np.float32).reshape(8, 64) if weight is None else weight
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    return model


def _external(folder: Path, **entries: object) -> Path:
    """model.onnx in the folder whose weight lies in w.data, with the given entries of its reference overridden."""
    model = _model()
    tensor = model.graph.initializer[0]
    (folder / "w.data").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "w.data", 0, 2048)
    for entry in tensor.external_data:
        entry.value = str(entries.get(entry.key, entry.value))
    tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_loads_with_the_weights_on_disk(tmp_path, monkeypatch):
    path = _external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model(Path("model.onnx"))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy().ravel(), np.arange(512))
    check_finite(model)
    assert model_hash(path) == model_hash(path)


def _whole() -> bytes:
    return _model().SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no ONNX graph"),
        (b"hello, this is no model", "no ONNX model"),
        (bytes(range(256)) * 40, "no ONNX model|holds no ONNX graph"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00", "qcompile export"),
        (_whole()[:-400], "truncated"),
        (_whole()[:30], "no ONNX model|holds no ONNX graph"),
        (_whole()[: _whole().rindex(b"\x42\x04")], "names no opset"),
        (_model(opset=27).SerializeToString(), "opset 27.*up to 26"),
        (_model(ir_version=2).SerializeToString(), "IR version 2"),
        (helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString(), "no nodes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_bad_content(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "model.onnx"
    whole = _whole()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_model(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="is not a file"):
        load_model(tmp_path)


def test_newer_ir_version_is_lowered(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(ir_version=14).SerializeToString())
    assert load_model(path).ir_version == 13


def test_domain_alias(tmp_path):
    model = _model()
    model.opset_import[0].domain = "ai.onnx"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert load_model(path).opset_imports == {"": 21}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "gone.data"}, "'gone.data' is missing"),
        ({"location": "../w.data"}, "outside of the model's folder"),
        ({"location": "sub/../../w.data"}, "outside of the model's folder"),
        ({"location": "/etc/hostname"}, "outside of the model's folder"),
        ({"location": ""}, "outside of the model's folder"),
        ({"location": "link.data"}, "outside of the model's folder"),
        ({"location": "circle.data"}, "cannot be found|is missing"),
        ({"location": "../models/link.data"}, "outside of the model's folder"),
        ({"offset": 64}, "too short"),
        ({"offset": -1}, "tensor 'w': the offset of its data in 'w.data' is no number: '-1'"),
        ({"length": 2047}, "do not hold"),
    ],
)
def test_bad_external_data(tmp_path, entries, message):
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(2048))
    (folder / "link.data").symlink_to(tmp_path / "w.data")
    (folder / "circle.data").symlink_to("circle.data")
    path = _external(folder, **entries)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "'w'" in str(caught.value) or "for tensor w" in str(caught.value)


def test_links_within_the_folder_are_fine(tmp_path):
    path = _external(tmp_path, location="link.data")
    (tmp_path / "link.data").symlink_to("w.data")
    assert load_model(path).graph.initializers["w"].const_value.numpy()[0, 1] == 1


def test_hard_links_are_files_like_others(tmp_path):
    path = _external(tmp_path)
    os.link(tmp_path / "w.data", tmp_path / "twin.data")
    assert load_model(path).graph.initializers["w"].const_value.numpy()[0, 1] == 1


def _cached(folder: Path, *names: str) -> Path:
    """The layout of the Hugging Face cache: snapshots/REVISION/onnx holds links to the files, which lie in blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a1b" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).rename(blobs / f"{number:040x}")
        (snapshot / name).symlink_to(Path("../../../blobs") / f"{number:040x}")
    return snapshot


def _contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_a_snapshot_of_links_into_blobs_loads_and_stays_as_it_was(tmp_path):
    path = _external(tmp_path)
    snapshot = _cached(tmp_path, path.name, "w.data")
    before = _contents(tmp_path / "blobs")
    (tmp_path / "current").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "current"):
        model = load_model(folder / path.name)
        assert model.graph.initializers["w"].const_value.numpy()[0, 1] == 1
        save_model(model, folder / "copy.onnx")
    made = [file for file in snapshot.iterdir() if file.name.startswith("copy")]
    assert len(made) == 2
    assert not any(file.is_symlink() for file in made)
    assert before == {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "blobs").iterdir()
    }


def test_a_linked_model_opens_no_folder_but_that_of_its_own_file(tmp_path):
    """Traversal: the data leads out of the folder of the links, and not into that of the blobs."""
    path = _external(tmp_path)
    (tmp_path / "secret").write_bytes((tmp_path / "w.data").read_bytes())
    snapshot = _cached(tmp_path, path.name, "w.data")
    (snapshot / "w.data").unlink()
    (snapshot / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside of the model's folder"):
        load_model(snapshot / path.name)


def test_tensors_of_subgraphs_are_checked_too(tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (bool c) => (float[4] y) {
             y = If (c) <then_branch = t () => (float[4] a) { a = Constant <value = float[4] {1,2,3,4}> () },
                         else_branch = e () => (float[4] b) { b = Constant <value = float[4] {1,2,3,4}> () }> }"""
    )
    tensor = model.graph.node[0].attribute[0].g.node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.raw_data = bytes(16)
    onnx.external_data_helper.set_external_data(tensor, "gone.data", 0, 16)
    tensor.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"gone\.data. is missing"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("flat", [True, False])
def test_sparse_tensors_are_read_as_dense_ones(tmp_path, dtype, flat):
    """As initializers, and as values of Constants; places as numbers of elements, or one an axis."""
    dense = np.zeros((3, 4), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    dense[[0, 1, 2], [3, 0, 2]] = [1, -2, 3]
    places = np.array([3, 4, 10]) if flat else np.array([[0, 3], [1, 0], [2, 2]])
    values = numpy_helper.from_array(dense[dense != 0], "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "i"), [3, 4])
    model = _model()
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], "c", sparse_value=sparse))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    read = load_model(path).graph
    np.testing.assert_array_equal(read.initializers["s"].const_value.numpy(), dense)
    np.testing.assert_array_equal(read[0].attributes["value"].as_tensor().numpy(), dense)


@pytest.mark.parametrize(
    ("places", "dims", "reason"),
    [
        ([3], [3], "an index outside"),
        ([-1], [3], "an index outside"),
        ([[0, 1]], [3], r"indices \[1, 2\] for 1 values"),
        ([0, 1], [3], "for 1 values"),
        ([0], [-3], "no sparse tensor"),
        ([0], [1 << 20, 1 << 24], "GB when it is dense"),
    ],
)
def test_bad_sparse_tensors(tmp_path, places, dims, reason):
    model = _model()
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places), "i"), [3])
    sparse.dims[:] = dims
    model.graph.sparse_initializer.append(sparse)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=reason):
        load_model(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weight_is_named(tmp_path, dtype, bad):
    import ml_dtypes

    weight = np.ones((8, 64), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weight[3, 5] = bad
    model = _model()
    model.graph.ClearField("initializer")
    kind = getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper()))
    model.graph.initializer.append(helper.make_tensor("w", kind, [8, 64], weight.tobytes(), raw=True))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    message = "'w' holds 1 NaN and 0 Inf" if np.isnan(bad) else "'w' holds 0 NaN and 1 Inf"
    with pytest.raises(UserError, match=message):
        check_finite(load_model(path))


def test_counting_says_nothing_by_itself(tmp_path):
    """ml_dtypes' comparisons warn of NaN; a warning would be a second line on stderr."""
    import ml_dtypes

    model = _model()
    model.graph.ClearField("initializer")
    weight = np.array([[np.nan, np.inf, -np.inf, 1]] * 8, ml_dtypes.bfloat16).repeat(16, axis=1)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [8, 64], weight.tobytes(), raw=True))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = load_model(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="holds 128 NaN and 256 Inf"):
            check_finite(loaded)


def test_infinite_masks_are_legitimate(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,2] x) => (float[2,2] y) { y = Add(x, mask) }'
    )
    mask = np.array([[0, -np.inf], [0, 0]], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    check_finite(load_model(path))


def test_a_pipe_is_not_read_for_its_hash(tmp_path):
    """Nobody writes into it: `sensitivity` waited for ever."""
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, message in ((tmp_path / "pipe.onnx", "is not a file"), (tmp_path / "none.onnx", "no such file")):
        with pytest.raises(UserError, match=message):
            model_hash(path)


def test_output_path(tmp_path):
    path = _external(tmp_path)
    (tmp_path / "same.onnx").symlink_to(path)
    for output in (path, tmp_path / "same.onnx", tmp_path / "w.data"):
        with pytest.raises(UserError, match="is the input file"):
            check_output_path(path, output)
    with pytest.raises(UserError, match="is a folder"):
        check_output_path(path, tmp_path)
    check_output_path(path, tmp_path / "new.onnx")


def test_hash_covers_the_weights(tmp_path):
    path = _external(tmp_path)
    before = model_hash(path)
    (tmp_path / "w.data").write_bytes(bytes(2048))
    assert model_hash(path) != before
