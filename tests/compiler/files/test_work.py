"""Folders of unfinished work beside an output: whose they are, and that they are no more than one."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qcompile.compiler.files import locks, publish, secret
from qcompile.compiler.files.header import Damaged, Header
from qcompile.compiler.files.work import Work
from qcompile.passes.errors import UserError


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of caches without a secret yet."""
    folder = tmp_path_factory.mktemp("caches") / "qcompile"
    monkeypatch.setenv("QCOMPILE_CACHE", str(folder))
    return folder


class Killed(Exception):
    """What ends a compile."""


def _folders(output: Path) -> list[Path]:
    return sorted(output.parent.glob(".*.work.tmp"))


def _ended(work: Work) -> Killed:
    """Have the compile end that the work is of."""
    error = Killed()
    work.__exit__(Killed, error, None)
    return error


def _leave(output: Path, key: str) -> Path:
    """What a compile of that key leaves that ends behind its third segment."""
    work = Work(output).__enter__()
    work.place(ir.tensor(np.arange(9000, dtype=np.int32)))
    with work.arrays(3) as arrays:
        arrays.write(b"arrays")
    work.keep(key, 3, 7, 1.5, b"content")
    (told,) = _ended(work).__notes__
    assert told == "what is finished is kept: the same command goes on at segment 4 of 7; --fresh starts over"
    assert work.folder is not None
    return work.folder


def test_it_is_taken_over_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.onnx"
    folder = _leave(output, "a")
    with Work(output) as work:
        assert work.waiting
        assert not work.adopted("b")
        assert work.adopted("a")
        content, arrays = work.content()
        assert (content, arrays.read()) == (b"content", b"arrays")
        tensor = work.place(ir.tensor(np.ones(5, np.float32)))
        assert tensor.offset is not None
        assert tensor.offset >= 9000 * 4
        assert np.array_equal(tensor.numpy(), np.ones(5))
        before = ir.ExternalTensor(work.tensors, 0, 36000, ir.DataType.INT32, shape=ir.Shape([9000]), name="before")
        assert np.array_equal(before.numpy(), np.arange(9000))
        with Work(output) as other:
            assert not other.waiting, "it is held"
            assert not other.adopted("a")
        assert _folders(output) == [folder]
    assert not _folders(output)


def test_at_most_one_stays(tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.onnx"
    first = _leave(output, "a")
    other = Work(output).__enter__()
    assert not other.adopted("b")
    _ended(other)
    assert _folders(output) == [first], "who has put nothing aside takes nothing away"
    assert _folders(output) != [second := _leave(output, "b")]
    assert _folders(output) == [second]
    with Work(output, fresh=True):
        assert not _folders(output)


@pytest.mark.skipif(not hasattr(Path, "owner"), reason="no owners")
def test_what_others_may_write_is_not_read(tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.onnx"
    _leave(output, "a").chmod(0o770)
    with Work(output) as work:
        assert not work.waiting
        assert not work.adopted("a")
    assert not _folders(output), "it is this user's, and nobody holds it"


def test_what_another_user_signed_is_not_read(tmp_path: Path, caches: Path) -> None:
    """An archive keeps modes, and who unpacks it owns the files."""
    output = tmp_path / "out" / "model.onnx"
    _leave(output, "a")
    key = caches / secret._NAME
    assert (key.stat().st_mode & 0o777, key.stat().st_size) == (0o600, 32)
    key.unlink()
    with Work(output) as work:
        assert work.waiting
        with pytest.raises(Damaged, match="is not of this user"):
            work.adopted("a")
        assert work.folder is work.kept is None, "nothing of it is taken"
        work.drop()
    assert not _folders(output)


def test_users_of_one_folder_of_caches_have_each_a_secret(caches: Path) -> None:
    assert secret.signature(b"a")
    assert [file.name for file in caches.iterdir()] == [f"checkpoints-{os.getuid()}.key"]


def test_every_byte_is_signed(tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.onnx"
    path = _leave(output, "a") / "checkpoint"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        work = Work(output).__enter__()
        with contextlib.suppress(Damaged):
            assert not work.adopted("a") or not work.content(), f"byte {position}"
        _ended(work)
    path.write_bytes(whole)
    with Work(output) as work:
        assert work.adopted("a")
        assert work.content()[0] == b"content"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = sorted(field.name for field in fields(Header))


@st.composite
def _headers(draw: st.DrawFn) -> Any:
    """What makes another first line of a whole one: of wrong types, too deep, cut, or anything else."""
    kind = draw(st.sampled_from(["types", "lacking", "more", "deep", "cut", "bytes", "value"]))
    if kind == "types":
        other = draw(st.dictionaries(st.sampled_from(_FIELDS), _VALUES, min_size=1))
        return lambda line: json.dumps(json.loads(line) | other).encode()
    if kind == "lacking":
        lost = draw(st.sampled_from(_FIELDS))
        return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != lost}).encode()
    if kind == "more":
        name, value = draw(st.text(min_size=1).filter(lambda name: name not in _FIELDS)), draw(_VALUES)
        return lambda line: json.dumps(json.loads(line) | {name: value}).encode()
    if kind == "deep":
        depth, opening = draw(st.sampled_from([1, 500, 200_000])), draw(st.sampled_from([b"[", b'{"key":', b"[{"]))
        return lambda line: opening * depth
    if kind == "cut":
        share = draw(st.floats(0, 1, exclude_max=True))
        return lambda line: line[: int(share * len(line))]
    anything = draw(st.binary()) if kind == "bytes" else json.dumps(draw(_VALUES)).encode()
    return lambda line: anything


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """A folder of caches, an output and the whole checkpoint that an unfinished compile left of it."""
    caches, output = tmp_path_factory.mktemp("left"), tmp_path_factory.mktemp("out") / "model.onnx"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QCOMPILE_CACHE", str(caches))
        return caches, output, (_leave(output, "a") / "checkpoint").read_bytes()


def _begun_anew(output: Path) -> bool:
    """Whether a compile of key "a" goes on from nothing; it is killed then."""
    work = Work(output).__enter__()
    try:
        assert work.waiting, "what lies there is told of"
        return not work.adopted("a")
    except Damaged:
        assert work.folder is work.kept is None
        work.drop()
        return True
    finally:
        _ended(work)


@given(damage=_headers())
@example(damage=lambda line: json.dumps(json.loads(line) | {"signature": 5}).encode())
@example(damage=lambda line: json.dumps(json.loads(line) | {"signature": "\ud800"}).encode())
@example(damage=lambda line: json.dumps(json.loads(line) | {"done": "x"}).encode())
@example(damage=lambda line: json.dumps(json.loads(line) | {"seconds": 2}).encode())
@example(damage=lambda line: b"[" * 200_000)
@example(damage=lambda line: line.replace(b" ", b""))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_a_header_that_is_not_what_was_signed_is_begun_anew(damage: Any, left: tuple[Path, Path, bytes]) -> None:
    """No exception but Damaged, whatever stands there, and nothing of it is taken."""
    caches, output, whole = left
    line, _, rest = whole.partition(b"\n")
    (folder,) = _folders(output)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QCOMPILE_CACHE", str(caches))
        found = damage(line)
        (folder / "checkpoint").write_bytes(found + b"\n" + rest)
        assert _begun_anew(output) != (found == line)


@pytest.mark.parametrize("place", ["a file", "read by others", "too short", "a link"])
def test_a_secret_that_is_none_signs_nothing(place: str, caches: Path) -> None:
    if place == "a file":
        caches.write_bytes(b"")
    else:
        assert secret.is_signed(b"a", secret.signature(b"a") or "")
        assert not secret.is_signed(b"b", secret.signature(b"a") or "")
        key = caches / secret._NAME
        if place == "read by others":
            key.chmod(0o644)
        elif place == "too short":
            key.write_bytes(b"")
        else:
            key.rename(caches / "moved")
            key.symlink_to(caches / "moved")
    assert secret.signature(b"a") is None
    assert not secret.is_signed(b"a", "")


@pytest.mark.parametrize("lacking", ["locks", "modes", "a secret"])
def test_nothing_is_kept_that_nobody_would_go_on_from(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    output = tmp_path / "out" / "model.onnx"
    if lacking == "locks":
        monkeypatch.setattr(locks, "fcntl", None)
    elif lacking == "modes":
        made = os.mkdir
        monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777: (made(path, mode), os.chmod(path, 0o755)))
    else:
        caches.write_bytes(b"")
    work = Work(output).__enter__()
    work.place(ir.tensor(np.arange(9000, dtype=np.int32)))
    assert work.unkept
    assert not hasattr(_ended(work), "__notes__")
    assert not _folders(output)


def test_an_output_of_a_longer_name_keeps_its_folder(tmp_path: Path) -> None:
    for name in ("m.onnx.v2", "m.onnx.abcdefgh", "m.onnx"):
        _leave(tmp_path / name, "a")
    with Work(tmp_path / "m.onnx", fresh=True) as work:
        assert not work.waiting
    for name in ("m.onnx.v2", "m.onnx.abcdefgh"):
        with Work(tmp_path / name) as work:
            assert work.adopted("a")


def test_a_tensor_that_finds_no_room_leaves_those_before_it(tmp_path: Path) -> None:
    """And takes no room: neither on the disk nor in a buffer that would be written at the end."""
    resource = pytest.importorskip("resource")
    small, large = (ir.tensor(np.arange(size, dtype=np.int32)) for size in (1000, 100_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Work(tmp_path / "model.onnx") as work:
        first = work.place(small)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(UserError) as raised:
                work.place(large)
            assert publish.is_full(raised.value.__cause__)
            assert work.tensors.stat().st_size == small.nbytes
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        second = work.place(large)
        assert first.numpy().tolist() == small.numpy().tolist()
        assert second.numpy().tolist() == large.numpy().tolist()


@pytest.mark.parametrize("failing", ["arrays", "checkpoint"])
def test_a_full_disk_leaves_no_part(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "model.onnx"
    folder = _leave(output, "a")
    there = {file.name for file in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work = Work(output).__enter__()
    assert work.adopted("a")
    if failing == "arrays":
        with pytest.raises(OSError, match="No space"), work.arrays(4):
            full()
    else:
        with work.arrays(4) as file:
            file.write(b"more")
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                work.keep("a", 4, 7, 2.0, b"other")
    assert {file.name for file in folder.iterdir()} == there
    _ended(work)
    with Work(output) as work:
        assert work.adopted("a")
        assert work.content()[0] == b"content"


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    """Who asks whether a folder is free holds its lock for a moment."""
    with locks.exclusive(tmp_path / "lock"):
        process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path / "lock",))
        process.start()
        process.join(1.0)
        assert process.is_alive()
    process.join()
    assert process.exitcode == 0


def _hold(path: Path) -> None:
    with locks.alive(path) as held:
        assert held


def test_a_folder_is_removed_before_it_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment of the removal another compile looks at, it takes nothing over."""
    output, remove = tmp_path / "out" / "model.onnx", shutil.rmtree
    _leave(output, "a")
    looked = list[bool]()

    def looking(path: Path, **options: Any) -> None:
        if not looked:
            for rest in (True, False):  # as it is, and when the lock file is gone first
                if not rest:
                    (path / ".alive").unlink()
                monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
                other = Work(output).__enter__()
                looked.append(other.waiting or other.adopted("a"))
                _ended(other)
        remove(path, **options)

    with Work(output) as work:
        assert work.adopted("a")
        monkeypatch.setattr(shutil, "rmtree", looking)
    assert looked == [False, False]


def _compete(output: Path, turns: int, seed: int) -> None:
    """What a compile does, again and again: some end, some are stopped, some go on."""
    generator = np.random.default_rng(seed)
    for _ in range(turns):
        with contextlib.suppress(Killed), Work(output) as work:
            if work.waiting and work.adopted("a"):
                assert work.content()[0] == b"content"
            assert work.folder is None or (work.folder / ".alive").exists()
            own = generator.integers(0, 256, 4096, dtype=np.uint8)
            placed = work.place(ir.tensor(own))
            with work.arrays(3) as arrays:
                arrays.write(b"arrays")
            work.keep("a", 3, 7, 1.5, b"content")
            assert np.array_equal(placed.numpy(), own), "nobody else writes or removes here"
            if generator.random() < 0.7:
                raise Killed


def test_compiles_of_one_output_never_share_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_compete, args=(output, 40, seed)) for seed in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    with Work(output, fresh=True):
        assert not _folders(output)
