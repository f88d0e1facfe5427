"""A compile that was stopped goes on behind its last checkpoint, and ends with the bytes of an undisturbed one."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Bench
from finishing import finished_segments
from graphs.table import Graph

import qcompile
from qcompile.compiler import ladder, stages
from qcompile.compiler.files import publish, secret, snapshot
from qcompile.compiler.files.snapshot import is_marked
from qcompile.compiler.files.work import Work
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk import checkpoints, program
from qcompile.compiler.walk import segments as segments_of
from qcompile.compiler.walk.checkpoints import Checkpoints
from qcompile.compiler.walk.pace import Pace
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes import lists
from qcompile.passes.base import Region
from qcompile.passes.errors import Verdict
from qcompile.passes.smooth import Smooth

# By name of the model: the lists that are stopped behind every segment.
LISTS = {
    "decoder": ("pack", lists.BEST, "smooth,awq,gptq,pack,fuse_attention,kv", "smooth,qdq"),
    "encoder": ("outlier,pack", "smooth,outlier,qdq", "smooth,qdq(observer=entropy)", "qdq,bias_correction"),
    "convolutions": ("qdq,bias_correction",),
}


# Of a report: what a run took, and where its files lie.
_OF_RUN = {"seconds", "peak_memory", "phases", "resumed", "output", "files"}


class Stopped(Exception):
    """What ends a compile behind a segment."""


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint behind every segment, signed, and nothing of what passes made held in memory."""
    monkeypatch.setattr(secret, "cache_dir", lambda: tmp_path / "caches")
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints, "_SHARE", float("inf"))
    monkeypatch.setattr(checkpoints, "HELD", 0)


def _stopped(
    bench: Bench, source: Path, passes: str, monkeypatch: pytest.MonkeyPatch, *, behind: int, **settings: Any
) -> Stopped:
    """Compile until so many segments are finished; 0: until the first is, which is not put aside."""
    after = Checkpoints.after

    def stopped(self: Checkpoints, state: Any, done: int, of: int, nodes: Any) -> None:
        if behind:
            after(self, state, done, of, nodes)
        if done >= behind:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "after", stopped)
        with pytest.raises(Stopped) as raised:
            bench.compile(source, passes, **settings)
    return raised.value


def _bytes(folder: Path) -> dict[str, bytes]:
    """What a compile wrote, but for its reports, which tell how long it took; hidden folders among it."""
    return {file.name: file.read_bytes() if file.is_file() else b"" for file in sorted(folder.iterdir())
            if ".report." not in file.name}  # fmt: skip


def _convolutions() -> Any:
    make = Graph()
    value = make.input("b", 3, 12, 12, sizes={"b": 4})
    for channels in (8, 8, 8, 8, 8):
        weight = make.floats(channels, 3 if value == make.inputs[0].name else 8, 3, 3)
        value = make.one("Relu", make.one("Conv", value, weight, kernel_shape=[3, 3]))
    pooled = make.one("Flatten", make.one("GlobalAveragePool", value))
    make.output(make.linear(make.linear(pooled, 16, 8), 16, 16))
    return make


def _saved(bench: Bench, kind: str) -> tuple[Path, dict[str, Any]]:
    """A model of that kind, and the settings that fit it."""
    if kind == "decoder":
        return bench.save(tiny_decoder(layers=2, kv_cache=True)), {"min_coverage": 0.0}
    if kind == "encoder":
        return bench.save(tiny_encoder()), {"min_coverage": 0.0}
    make = _convolutions()
    folder = bench.folder / "in"
    folder.mkdir(parents=True)
    onnx.save(make.model(), folder / "model.onnx")
    np.savez(folder / "data.npz", **make.feeds(0))
    return folder / "model.onnx", {"min_coverage": 0.0, "calibration": [str(folder / "data.npz")]}


def _story(report: Report) -> dict[str, Any]:
    """What a report tells, but for what it took and where it lies."""
    told = json.loads(report.to_json())
    return {name: value for name, value in told.items() if name not in _OF_RUN}


CASES = [(kind, passes) for kind, tried in LISTS.items() for passes in tried]


@pytest.mark.parametrize(("kind", "passes"), CASES)
def test_same_bytes_after_a_stop_behind_every_segment(
    kind: str, passes: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compile, stopped behind the first segment, gone on with, stopped behind the second …"""
    source, options = _saved(bench, kind)
    monkeypatch.setattr(segments_of, "_SEGMENTS", 4)  # so that convolutions are cut at, too
    done = finished_segments(monkeypatch)
    whole = bench.compile(source, passes, output="whole/model.onnx", **options)
    segments, wanted = done[-1], _bytes(bench.folder / "whole")
    assert done == list(range(1, segments + 1))
    assert segments > 2
    for behind in range(1, segments + 1):
        done.clear()
        stopped = _stopped(bench, source, passes, monkeypatch, behind=behind, **options)
        assert done == [behind], "finished segments are left out"
        there = f"segment {behind + 1} of {segments}" if behind < segments else "the end of the segments"
        assert stopped.__notes__ == [
            f"what is finished is kept: the same command goes on at {there}; --fresh starts over"
        ]
    report = bench.compile(source, passes, **options)
    assert report.resumed == there
    assert _bytes(bench.folder / "out") == wanted
    assert _story(report) == _story(whole)


@pytest.mark.parametrize("behind", [0, 2])
def test_same_bytes_after_one_stop(behind: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not restored time and again; 0: stopped before the first checkpoint, which leaves nothing."""
    source = bench.save(tiny_decoder(layers=2, tied=False))
    bench.compile(source, lists.BEST, output="whole/model.onnx")
    _stopped(bench, source, lists.BEST, monkeypatch, behind=behind)
    assert len(list((bench.folder / "out").glob(".*"))) == bool(behind)
    assert bool(bench.compile(source, lists.BEST).resumed) == bool(behind)
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


Change = Callable[[Bench, pytest.MonkeyPatch], dict[str, Any]]


def _other_source(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    bench.save(tiny_decoder(layers=2, seed=1))
    return {}


def _other_data(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    other = bench.folder / "other.txt"
    other.write_text(bench.text.read_text()[1000:])
    return {"calibration": [str(other)]}


def _other_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(stages, "versions", lambda: {"onnxruntime": "0.0"})
    return {}


def _other_program(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(program, "digest_of", lambda passes: "another text")
    return {}


def _other_machine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(program, "threadpool_info", lambda: [{"internal_api": "openblas", "architecture": "Zen9"}])
    return {}


def _other_threads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(program, "workers", lambda: 77)
    return {}


CHANGES: dict[str, Change] = {
    "source": _other_source,
    "recipe": lambda bench, monkeypatch: {"bits": 8},
    "data": _other_data,
    "version": _other_version,
    "program": _other_program,
    "machine": _other_machine,
    "threads": _other_threads,
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_else_is_gone_on_from(
    change: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = bench.save(tiny_decoder(layers=2))
    _stopped(bench, source, "smooth,pack", monkeypatch, behind=2)
    settings = CHANGES[change](bench, monkeypatch)
    report = bench.compile(source, "smooth,pack", **settings)
    assert not report.resumed
    assert "is not gone on from" in caplog.text
    bench.compile(source, "smooth,pack", output="whole/model.onnx", **settings)
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole"), "and what was left is removed"


def _left_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that was compiled to whole/, and of whose compile to out/ a checkpoint is left: its folder of work."""
    source = bench.save(tiny_decoder(layers=2))
    bench.compile(source, "smooth,pack", output="whole/model.onnx")
    _stopped(bench, source, "smooth,pack", monkeypatch, behind=2)
    (folder,) = (bench.folder / "out").glob(".model.onnx.*.work.tmp")
    return source, folder


@pytest.mark.parametrize("name", ["checkpoint", "arrays-2", "tensors"])
def test_a_truncated_checkpoint_is_ignored(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = _left_behind(bench, monkeypatch)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    assert not bench.compile(source, "smooth,pack").resumed
    assert "begun anew" in caplog.text
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


@pytest.mark.parametrize("header", [b'{"signature": 5}', b"[" * 200_000, b""], ids=["types", "deep", "empty"])
def test_a_damaged_header_is_ignored(
    header: bytes, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And who is killed then says nothing of what it never had."""
    source, folder = _left_behind(bench, monkeypatch)
    (folder / "checkpoint").write_bytes(header + b"\n")
    assert not hasattr(_stopped(bench, source, "smooth,pack", monkeypatch, behind=0), "__notes__")
    caplog.clear()
    assert not bench.compile(source, "smooth,pack").resumed
    assert "begun anew" in caplog.text
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_fresh_starts_over(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_decoder(layers=2))
    words = ["--passes", "pack", "--calibration", str(bench.text)]

    def interrupted(self: Checkpoints, state: Any, done: int, of: int, nodes: Any) -> None:
        after(self, state, done, of, nodes)
        raise KeyboardInterrupt

    for option, behind in (([], 1), ([], 2), (["--fresh"], 1)):
        with monkeypatch.context() as patched:
            after = Checkpoints.after
            patched.setattr(Checkpoints, "after", interrupted)
            assert bench.run(source, *words, *option) == 130
        error = capsys.readouterr().err
        assert "qcompile: interrupted, the output was not written\n" in error
        assert f"goes on at segment {behind + 1} of " in error
        assert len(list((bench.folder / "out").iterdir())) == 1, "one folder, whatever was interrupted"
    assert bench.run(source, *words) == 0
    told = capsys.readouterr().out
    assert "s in all, peak memory" in told
    assert "it was interrupted, and went on at segment 2 of " in told
    page = (bench.folder / "out" / "model.report.html").read_text()
    assert "memory and phases are those since" in told
    assert "memory and phases are those since" in page


def test_what_is_refused_goes_on_once_it_is_not(bench: Bench) -> None:
    """A program reads of its keywords, and of a call."""
    source, out = bench.save(tiny_decoder(layers=2)), bench.folder / "out" / "model.onnx"
    fields: dict[str, Any] = {"output": out, "calibration": bench.text, "group_size": 32}
    with pytest.raises(qcompile.Verdict) as refused:
        qcompile.compile(source, "pack", min_cosine=1.0, **fields)
    (told,) = refused.value.__notes__
    assert told == (
        "what is finished is kept: the same call goes on at the end of the segments once the cause is mended (or "
        "min_cosine= or min_coverage= loosened); fresh= starts over"
    )
    assert qcompile.compile(source, "pack", **fields).resumed == "the end of the segments"


def test_a_list_that_cannot_be_put_aside_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, begin = bench.save(tiny_decoder(layers=2)), Smooth.call

    def call(self: Smooth, region: Region) -> None:
        self.held = lambda: region  # type: ignore[attr-defined]
        begin(self, region)

    monkeypatch.setattr(Smooth, "call", call)
    bench.compile(source, "smooth,pack")
    (told,) = [own.getMessage() for own in caplog.records if "begins anew" in own.getMessage()]
    assert "the state of pass smooth" in told
    assert not list((bench.folder / "out").glob(".*"))


@pytest.mark.parametrize("error", [ValueError("ctypes objects"), RecursionError("too deep"), KeyError("k")], ids=repr)
def test_whatever_a_state_raises_is_a_note(
    error: Exception, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, begin = bench.save(tiny_decoder(layers=2)), Smooth.call

    def call(self: Smooth, region: Region) -> None:
        self.held = _Refusing(error)  # type: ignore[attr-defined]
        begin(self, region)

    monkeypatch.setattr(Smooth, "call", call)
    bench.compile(source, "smooth,pack")
    (told,) = [own.getMessage() for own in caplog.records if "begins anew" in own.getMessage()]
    assert "the state of pass smooth" in told
    assert not list((bench.folder / "out").glob(".*"))


class _Refusing:
    """Raises when it is pickled."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def test_a_pass_that_was_typed_in_is_a_note(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unfound(kind: type) -> str:
        raise TypeError("is a built-in class")

    monkeypatch.setattr(Smooth, "__module__", "__main__")
    monkeypatch.setattr(program.inspect, "getfile", unfound)
    bench.compile(bench.save(tiny_decoder(layers=2)), "smooth,pack")
    (told,) = [own.getMessage() for own in caplog.records if "begins anew" in own.getMessage()]
    assert told.endswith("the program of pass smooth has no file")


def test_a_checkpoint_that_cannot_be_read_is_begun_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The state of a pass raises when it is read, the last thing but the model's own objects."""
    source = bench.save(tiny_decoder(layers=2))
    bench.compile(source, "smooth,pack", output="whole/model.onnx")
    _stopped(bench, source, "smooth,pack", monkeypatch, behind=2)

    def fill(*_: Any) -> None:
        raise AttributeError("no such field any more")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_fill", fill)
        assert not bench.compile(source, "smooth,pack").resumed
    assert "begun anew: the checkpoint cannot be read (AttributeError: no such field any more)" in caplog.text
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_data_is_read_when_the_compile_begins(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the first checkpoint: who changes a batch in place meanwhile has changed what is computed."""
    read, digest_of = list[int](), checkpoints._digest_of
    monkeypatch.setattr(checkpoints, "_digest_of", lambda batches: (read.append(len(done)), digest_of(batches))[1])
    done = finished_segments(monkeypatch)
    bench.compile(bench.save(tiny_decoder(layers=2)), "pack")
    assert set(read) == {0}


def test_a_verdict_can_be_loosened_without_the_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source, done = bench.save(tiny_decoder(layers=2)), finished_segments(monkeypatch)
    with pytest.raises(Verdict, match="min-cosine"):
        bench.compile(source, "pack", min_cosine=1.0)
    done.clear()
    assert bench.compile(source, "pack", min_cosine=0.5).resumed == "the end of the segments"
    assert not done


def test_steps_without_data_are_climbed_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source, climbed, climb = bench.save(tiny_decoder(layers=2)), list[int](), ladder.climb

    def counted(*given: Any) -> Any:
        climbed.append(1)
        return climb(*given)

    monkeypatch.setattr(ladder, "climb", counted)
    whole = bench.compile(source, "smooth,pack", calibration=["self"], output="whole/model.onnx")
    _stopped(bench, source, "smooth,pack", monkeypatch, behind=2, calibration=["self"])
    report = bench.compile(source, "smooth,pack", calibration=["self"])
    assert climbed == [1, 1]
    assert report.resumed
    assert report.ladder == whole.ladder
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_a_disk_too_full_for_checkpoints_ends_no_compile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Work, done: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Work, "arrays", full)
    bench.compile(bench.save(tiny_decoder(layers=2)), "pack")
    assert [own.getMessage() for own in caplog.records] == [
        f"no more checkpoints beside {bench.folder / 'out' / 'model.onnx'}: No space left on device"
    ]


def test_a_full_disk_keeps_tensors_in_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors that find no room stay in memory: the compile goes on without more checkpoints, with the same bytes."""
    source, place = bench.save(tiny_decoder(layers=2)), Work.place
    bench.compile(source, "pack", output="whole/model.onnx")

    def full(self: Work, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        if self.kept is not None and self.kept.done >= 1:
            failed.append(self.kept.done)
            with publish.writing(self.output):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return place(self, tensor)

    keep, kept, failed = Work.keep, list[int](), list[int]()
    monkeypatch.setattr(Work, "keep", lambda work, *told: (kept.append(told[1]), keep(work, *told)))
    monkeypatch.setattr(Work, "place", full)
    bench.compile(source, "pack")
    assert failed == kept[-1:], "it is tried once, and no checkpoint comes behind it"
    assert [own.getMessage() for own in caplog.records] == [
        "packed weights stay in memory, and there are no more checkpoints: "
        f"cannot write {bench.folder / 'out' / 'model.onnx'}: No space left on device; free some space or write "
        "elsewhere"
    ]
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_progress_tells_the_pace() -> None:
    pace = Pace(61, 6)
    assert pace.told(6) == "segment 7 of 61"
    assert re.fullmatch(r"segment 8 of 61, [\d.e-]+ s each, [\d.]+ GB", pace.told(7))


def test_a_compile_of_seconds_pays_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def never(self: Work) -> Path:
        raise AssertionError("a folder was made")

    monkeypatch.setattr(Work, "_made", never)
    bench.compile(bench.save(tiny_decoder()), "pack")


def test_nothing_that_passes_make_stays_in_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `HELD` 0 every initializer of 4 KB or more is the source's or lies in the folder, behind each segment."""
    after = Checkpoints.after

    def looked_at(self: Checkpoints, state: Any, done: int, of: int, nodes: Any) -> None:
        after(self, state, done, of, nodes)
        for value in self._model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            assert is_marked(tensor) or tensor.nbytes < 4096 or isinstance(tensor, ir.ExternalTensor)

    monkeypatch.setattr(Checkpoints, "after", looked_at)
    monkeypatch.setattr(checkpoints, "EVERY", float("inf"))
    bench.compile(bench.save(tiny_decoder(layers=2)), lists.BEST, output="out/model.onnx")
    monkeypatch.undo()
    bench.compile(bench.folder / "in" / "model.onnx", lists.BEST, output="whole/model.onnx")
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")
