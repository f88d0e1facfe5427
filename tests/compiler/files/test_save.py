"""Saving: what is read back is what was saved, equal bytes once, and all or nothing."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.files import locks, save
from qcompile.compiler.files import publish as output_files
from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.files.locks import exclusive
from qcompile.compiler.files.publish import publish, staging
from qcompile.passes.errors import UserError
from qcompile.passes.tensors import lazy

DTYPES = ["float32", "float16", "float64", "int8", "uint8", "int64", "bool", "bfloat16", "int4", "uint4"]


def _model(tensors: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A graph that hands out each of the tensors."""
    nodes, values = [], []
    for name, tensor in tensors.items():
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        values.append(value)
        nodes.append(ir.node("Identity", [value], name=f"node_{name}"))
        nodes[-1].outputs[0].name = f"{name}_out"
    outputs = [node.outputs[0] for node in nodes]
    for output, value in zip(outputs, values, strict=True):
        output.shape, output.type = value.shape, value.type
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, name="g", opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def _tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> ir.Tensor:
    target = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    return ir.Tensor(rng.integers(0, 8, shape).astype(target))


def _content(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        name: (str(value.const_value.dtype), value.const_value.tobytes())
        for name, value in load_model(path).graph.initializers.items()
    }


def _files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 70), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_round_trip(tmp_path_factory, specs, seed):
    folder = tmp_path_factory.mktemp("save")
    rng = np.random.default_rng(seed)
    tensors = {f"t{i}": _tensor(rng, tuple(shape), dtype) for i, (shape, dtype) in enumerate(specs)}
    model = _model(tensors)
    report = save_model(model, folder / "model.onnx", metadata={"key": "value"})
    onnx.checker.check_model(report.paths[0], full_check=True)
    assert _content(report.paths[0]) == {n: (str(t.dtype), t.tobytes()) for n, t in tensors.items()}
    assert load_model(report.paths[0]).metadata_props["key"] == "value"
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())
    assert "key" not in model.metadata_props
    assert [path.name for path in sorted(report.paths)] == _files(folder)
    assert report.data_bytes == sum(path.stat().st_size for path in report.paths[1:])
    assert report.model_bytes == report.paths[0].stat().st_size


def test_equal_bytes_are_stored_once_whatever_the_shape(tmp_path):
    table = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    other = table + 1
    tensors = {"a": ir.Tensor(table), "x": ir.Tensor(other), "b": ir.Tensor(table.reshape(32, 64).copy())}
    report = save_model(_model(tensors), tmp_path / "model.onnx")
    assert report.data_bytes == 2 * table.nbytes
    loaded = load_model(report.paths[0]).graph.initializers
    assert loaded["a"].const_value.offset == loaded["b"].const_value.offset == 0
    np.testing.assert_array_equal(loaded["b"].const_value.numpy(), table.reshape(32, 64))
    np.testing.assert_array_equal(loaded["x"].const_value.numpy(), other)


def test_offsets_are_aligned(tmp_path):
    sizes = [2000, 3001, 1 << 20, (1 << 20) + 1, 5000]
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": ir.Tensor(rng.integers(0, 255, size, np.uint8)) for i, size in enumerate(sizes)}
    report = save_model(_model(tensors), tmp_path / "model.onnx")
    offsets = [value.const_value.offset for value in load_model(report.paths[0]).graph.initializers.values()]
    assert all(offset % 64 == 0 for offset in offsets)
    assert offsets[3] % 4096 == 0


def test_small_tensors_stay_in_the_model_file(tmp_path):
    report = save_model(_model({"a": ir.Tensor(np.ones(8, np.float32))}), tmp_path / "model.onnx")
    assert _files(tmp_path) == ["model.onnx"]
    assert report.data_bytes == 0


def test_same_content_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: ir.Tensor(rng.standard_normal((64, 64)).astype(np.float32)) for name in "abc"}
    first = save_model(_model(tensors), tmp_path / "one" / "model.onnx")
    second = save_model(load_model(first.paths[0]), tmp_path / "two" / "model.onnx")
    for a, b in zip(first.paths, second.paths, strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()


def test_lazy_tensors_are_evaluated_once_and_one_at_a_time(tmp_path):
    evaluated = []

    def watched(name: str):
        def function(array):
            evaluated.append(name)
            return array * 2

        return function

    base = ir.Tensor(np.ones((64, 64), np.float32))
    tensors = {name: lazy(base, watched(name), shape=(64, 64)) for name in "ab"}
    report = save_model(_model(tensors), tmp_path / "model.onnx")
    assert evaluated == ["a", "b"]
    assert report.data_bytes == 64 * 64 * 4, "equal results are a tie"


def test_external_tensors_in_attributes_and_subgraphs_move_into_the_model(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.data").write_bytes(np.arange(400, dtype=np.float32).tobytes())
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (bool c) => (float[400] y) {
             y = If (c) <then_branch = t () => (float[400] a) { a = Constant <value = float[400] {}> () },
                         else_branch = e () => (float[400] b) { b = Constant <value = float[400] {}> () }> }"""
    )
    for branch in model.graph.node[0].attribute:
        tensor = branch.g.node[0].attribute[0].t
        tensor.raw_data = bytes(1600)
        onnx.external_data_helper.set_external_data(tensor, "c.data", 0, 1600)
        tensor.ClearField("raw_data")
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    report = save_model(load_model(tmp_path / "in" / "model.onnx"), tmp_path / "out" / "model.onnx")
    assert _files(tmp_path / "out") == ["model.onnx"]
    node = onnx.load(report.paths[0]).graph.node[0].attribute[0].g.node[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(node.attribute[0].t), np.arange(400))


def _big(value: float) -> ir.Model:
    return _model({"w": ir.Tensor(np.full((64, 64), value, np.float32))})


def test_overwriting_replaces_the_pair_and_spares_other_models(tmp_path):
    old = save_model(_big(1), tmp_path / "model.onnx")
    (tmp_path / "copy.onnx").write_bytes(old.paths[0].read_bytes())
    new = save_model(_big(2), tmp_path / "model.onnx")
    assert _files(tmp_path) == sorted(["copy.onnx", "model.onnx", old.paths[1].name, new.paths[1].name])
    (tmp_path / "copy.onnx").unlink()
    last = save_model(_big(3), tmp_path / "model.onnx")
    assert _files(tmp_path) == sorted(["model.onnx", last.paths[1].name]), "nobody needs the older data any more"


def test_saving_over_the_model_that_is_loaded(tmp_path):
    save_model(_big(1), tmp_path / "model.onnx")
    model = load_model(tmp_path / "model.onnx")
    save_model(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), 1)


class _Disk:
    """Opens files that share what little room is left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, mode: str) -> "_File":
        return _File(self, open(path, mode))


class _File:
    def __init__(self, disk: _Disk, file) -> None:
        self._disk, self._file = disk, file

    def write(self, data) -> int:
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _files(folder)}


@pytest.mark.parametrize("room", [0, 10_000, 64 * 64 * 4], ids=["nothing", "some", "data only"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, room):
    save_model(_big(1), tmp_path / "model.onnx")
    before = _snapshot(tmp_path)
    monkeypatch.setattr(save, "open", _Disk(room).open, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*No space left.*free some space"):
        save_model(_big(2), tmp_path / "model.onnx")
    assert _snapshot(tmp_path) == before


def test_file_size_limit_of_the_system(tmp_path):
    script = f"""
import resource, sys, numpy as np, onnx_ir as ir
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_save as t
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    t.save_model(t._big(1), Path({str(tmp_path)!r}) / "model.onnx")
except t.UserError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "File too large" in output
    assert _files(tmp_path) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("count", [1, 2])
def test_interrupted(tmp_path, monkeypatch, moment, count):
    save_model(_big(1), tmp_path / "model.onnx")
    before = _snapshot(tmp_path)
    calls = []
    original = getattr(os, moment)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(output_files.os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(_big(2), tmp_path / "model.onnx")
    monkeypatch.undo()
    assert _snapshot(tmp_path) == before


def test_interrupted_right_after_the_second_rename(tmp_path, monkeypatch):
    original = os.replace

    def late(source, target):
        original(source, target)
        if Path(target).suffix == ".onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(output_files.os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        save_model(_big(2), tmp_path / "model.onnx")
    monkeypatch.undo()
    assert _content(tmp_path / "model.onnx")["w"][1] == np.full((64, 64), 2, np.float32).tobytes()


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="needs 0 MB, 0 MB are free"):
        save_model(_big(1), tmp_path / "model.onnx")
    assert _files(tmp_path) == []
    save_model(_big(1), tmp_path / "model.onnx", check_space=False)


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match="cannot write"):
        save_model(_big(1), tmp_path / "file" / "model.onnx")


_STAGING = """
import sys, time
from pathlib import Path
from qcompile.compiler.files.publish import staging
with staging(Path(sys.argv[1])) as staged:
    staged.write_bytes(b"x")
    print(staged.parent.name, flush=True)
    time.sleep(600)
"""


def _staging(path: Path) -> tuple[subprocess.Popen, str]:
    """A process that writes an output, and the name of its hidden folder."""
    process = subprocess.Popen([sys.executable, "-c", _STAGING, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_what_killed_processes_left_is_removed(tmp_path):
    """Found by the lock of the folder, whatever number the process had; what the living write stays."""
    (dead, litter), (other, others) = _staging(tmp_path / "model.onnx"), _staging(tmp_path / "other.onnx")
    living, work = _staging(tmp_path / "model.onnx")
    for process in (dead, other):
        process.kill()
        process.wait()
    (tmp_path / ".model.lock").write_bytes(b"")  # of one killed while it had the lock
    (tmp_path / "model-0123456789ab.data").write_bytes(b"x")
    (tmp_path / "model-mine.data").write_bytes(b"x")
    try:
        report = save_model(_big(1), tmp_path / "model.onnx")
        assert litter not in os.listdir(tmp_path)
        assert _files(tmp_path) == sorted([work, others, "model-mine.data", *(path.name for path in report.paths)])
    finally:
        living.kill()
        living.wait()


_TRYING = """
import os, signal, sys
from pathlib import Path
from qcompile.compiler.files import publish
publish._remove = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
publish.check_place(Path(sys.argv[1]))
"""


def test_what_a_killed_process_tried_a_place_with_is_removed(tmp_path):
    """The report's place is tried, too, and nothing of its own name is ever staged."""
    for name in ("model.onnx", "model.report.json", "model.report.html", "model"):
        assert subprocess.run([sys.executable, "-c", _TRYING, str(tmp_path / name)], check=False).returncode == -9
    assert len(_files(tmp_path)) == 4
    report = save_model(_big(1), tmp_path / "model.onnx")
    assert _files(tmp_path) == sorted(path.name for path in report.paths)


def test_a_reader_of_the_replaced_model_finds_its_data(tmp_path, monkeypatch):
    """Whoever has opened a model file opens its data next: that goes a moment behind the model, and not at once."""
    path, there = tmp_path / "model.onnx", []

    def moment(seconds: float) -> None:
        assert 0 < seconds < 1
        there.append(len(_files(tmp_path)) - len(list(tmp_path.glob(".*"))))

    monkeypatch.setattr(output_files.time, "sleep", moment)
    for number in (1, 2, 2, 1):
        save_model(_big(number), path)
        assert len(_files(tmp_path)) == 2
    assert there == [3, 3], "the model and both data files, where it was another model"


def test_data_that_any_model_of_the_folder_names_stays(tmp_path):
    """A model need not be called .onnx; a FIFO called so is not read."""
    first = save_model(_big(1), tmp_path / "model")
    copy = save_model(_big(2), tmp_path / "model.onnx")
    (tmp_path / "copied").write_bytes(copy.paths[0].read_bytes())
    os.mkfifo(tmp_path / "pipe.onnx")
    last = save_model(_big(3), tmp_path / "model.onnx")
    names = {path.name for report in (first, copy, last) for path in report.paths}
    assert set(_files(tmp_path)) == {*names, "copied", "pipe.onnx"}
    assert len(names) == 5
    for path, value in ((first.paths[0], 1), (tmp_path / "copied", 2), (last.paths[0], 3)):
        assert _content(path)["w"][1] == np.full((64, 64), value, np.float32).tobytes()


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "link to a fifo"])
@pytest.mark.parametrize("name", ["model.onnx", "model.report.json"])
def test_only_regular_files_are_replaced(tmp_path, kind, name):
    target = tmp_path / name
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(target))
    else:
        os.mkfifo(tmp_path / "pipe")
        target.symlink_to(tmp_path / "pipe")
    before = target.lstat()
    with pytest.raises(UserError, match=r"is a \w+, and would be replaced by a file"), staging(target):
        pass
    if name != "model.onnx":
        with staging(tmp_path / "model.onnx") as staged:
            report = staged.with_name(name)
            for file in (staged, report):
                file.write_bytes(b"x")
            with pytest.raises(UserError, match=r"is a \w+, and would be replaced by a file"):
                publish([staged], tmp_path / "model.onnx", [report])
        assert not (tmp_path / "model.onnx").exists(), "nothing is published then"
    after = target.lstat()
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    blob = save_model(_big(1), tmp_path / "blobs" / "blob").paths[0]
    (tmp_path / "model.onnx").symlink_to(blob)
    before = blob.read_bytes()
    save_model(_big(2), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").is_symlink()
    assert blob.read_bytes() == before


def test_the_lock_is_waited_for_and_then_told(tmp_path):
    with exclusive(tmp_path / "lock"):
        with (
            pytest.raises(UserError, match="another process writes the same output"),
            exclusive(tmp_path / "lock", 0.1),
        ):
            pass
        waiting = threading.Thread(target=save_model, args=(_big(1), tmp_path / "model.onnx"))
        with exclusive(tmp_path / ".model.lock"):
            waiting.start()
            time.sleep(0.2)
            assert _files(tmp_path) == [".model.lock", "lock"]
        waiting.join()
    assert len(_files(tmp_path)) == 2, "the model and its data, no lock"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), None], ids=["file system", "platform"])
def test_without_locks_nothing_of_others_is_removed(tmp_path, monkeypatch, error):
    process, work = _staging(tmp_path / "model.onnx")
    process.kill()
    process.wait()
    if error is None:
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", lambda *_: (_ for _ in ()).throw(error))
    report = save_model(_big(1), tmp_path / "model.onnx")
    assert _files(tmp_path) == sorted([work, *(path.name for path in report.paths)])


def _look(path: Path) -> None:
    """The model that is there has its data, unless another took its place while it was read."""
    before = path.stat()
    try:
        loaded = load_model(path).graph.initializers["w"].const_value
        assert loaded is not None
        assert np.unique(loaded.numpy()).size == 1
    except (UserError, FileNotFoundError, ValueError):
        assert path.stat().st_ino != before.st_ino or path.stat().st_mtime_ns != before.st_mtime_ns


def test_threads_and_processes_that_write_one_output(tmp_path):
    """Whoever comes last, the model and its data are of one of them, and nothing else stays."""
    path = tmp_path / "model.onnx"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_save as t; from pathlib import Path\n"
        "for i in range(10): t.save_model(t._big(int(sys.argv[3]) + i), Path(sys.argv[2]))"
    )
    here = str(Path(__file__).parent)
    processes = [subprocess.Popen([sys.executable, "-c", script, here, str(path), str(n)]) for n in (100, 200)]
    threads = [
        threading.Thread(target=lambda n=n: [save_model(_big(n + i), path) for i in range(10)]) for n in (300, 400)
    ]
    for thread in threads:
        thread.start()
    while any(process.poll() is None for process in processes) or any(thread.is_alive() for thread in threads):
        if path.exists():
            _look(path)
    for waited in (*processes, *threads):
        waited.wait() if isinstance(waited, subprocess.Popen) else waited.join()
    assert [process.returncode for process in processes] == [0, 0]
    value = load_model(path).graph.initializers["w"].const_value.numpy()
    assert np.unique(value).size == 1
    assert len(_files(tmp_path)) == 2
