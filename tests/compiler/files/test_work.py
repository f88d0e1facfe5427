"""Folders of unfinished work beside an output: whose they are, and that they are no more than one."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.files.work import Work


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
