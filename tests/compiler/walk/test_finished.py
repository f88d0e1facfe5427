"""The walk of a finished compile is taken by another one where only what comes behind it has changed."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from conftest import Bench
from finishing import finished_segments

import qcompile
from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.files import finished, secret
from qcompile.compiler.pipeline import Chosen
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import TooLarge
from qcompile.compiler.walk import program
from qcompile.compiler.walk.checkpoints import Checkpoints
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes import library as native_kernels
from qcompile.passes.errors import UserError

# Of a report: what a run took, and where its files lie.
_OF_RUN = {"seconds", "peak_memory", "phases", "resumed", "reused", "output", "files"}

Settings = dict[str, Any]
# (kind of model, settings of the compile that is kept, of the one that takes its walk)
REUSED: dict[str, tuple[str, Settings, Settings]] = {
    "a late pass more": ("decoder", {"passes": "smooth,pack"}, {"passes": "smooth,pack,fuse"}),
    "one less": ("decoder", {"passes": "pack,fuse"}, {"passes": "pack", "attention": "plain"}),
    "parameters of one": ("decoder", {"passes": "pack,fuse"}, {"passes": "pack,fuse(inputs=false)"}),
    "attention": ("decoder", {"passes": "pack", "attention": "plain"}, {"passes": "pack", "attention": "fused"}),
    "caches": ("decoder", {"passes": "smooth,gptq,pack"}, {"passes": "smooth,gptq,pack", "caches": "float16"}),
    "caches by a pass": ("decoder", {"passes": "pack"}, {"passes": "pack,kv16"}),
    "a bound": ("decoder", {"passes": "pack", "min_cosine": 0.1}, {"passes": "pack", "min_cosine": 0.2}),
    "nodes kept": ("encoder", {"passes": "smooth,qdq", "keep_worst": 1}, {"passes": "smooth,qdq", "keep_worst": 2}),
    "a bound of what is kept": ("encoder", {"passes": "qdq", "keep_share": 0.9}, {"passes": "qdq", "keep_share": 0.5}),
}
# The same, of which the walk reads what is different.
READ: dict[str, tuple[str, Settings, Settings]] = {
    "bits": ("decoder", {"passes": "pack"}, {"passes": "pack", "bits": 8}),
    "a pass of the walk": ("decoder", {"passes": "smooth,pack"}, {"passes": "awq,pack"}),
    "its order": ("decoder", {"passes": "smooth,awq,pack"}, {"passes": "awq,smooth,pack"}),
    "its parameters": ("decoder", {"passes": "smooth,pack"}, {"passes": "smooth(alpha=0.5),pack"}),
    "a late pass that sees ranges": ("decoder", {"passes": "pack"}, {"passes": "pack,kv"}),
    "parameters of one": ("encoder", {"passes": "qdq"}, {"passes": "qdq(observer=minmax)"}),
    "what passes before it judge by": ("encoder", {"passes": "smooth,dynamic"}, {"passes": "smooth,qdq"}),
    "scales": ("decoder", {"passes": "pack"}, {"passes": "pack", "scale_bits": 16}),
    "seed": ("decoder", {"passes": "smooth,pack"}, {"passes": "smooth,pack", "seed": 1}),
    "target": ("decoder", {"passes": "pack"}, {"passes": "pack", "target": "matmulnbits"}),
    "rows held aside for a bound": (
        "encoder",
        {"passes": "qdq", "keep_worst": 1},
        {"passes": "qdq", "keep_share": 0.5},
    ),
    "what is verified": ("decoder", {"passes": "pack"}, {"passes": "pack", "verify": "sample"}),
    "data": ("decoder", {"passes": "pack"}, {"passes": "pack", "calibration": ["self"]}),
    "names": ("decoder", {"passes": "pack"}, {"passes": "pack", "exclude": ("*up_proj*",)}),
}


@pytest.fixture(autouse=True)
def _signed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secret, "cache_dir", lambda: tmp_path / "caches")


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of segments, as they are finished."""
    return finished_segments(monkeypatch)


def _source(bench: Bench, kind: str) -> Path:
    return bench.save(tiny_decoder(layers=2, kv_cache=True) if kind == "decoder" else tiny_encoder())


def _compiled(bench: Bench, source: Path, output: str, settings: Settings, **more: Any) -> Report:
    return bench.compile(source, output=f"{output}/model.onnx", **{"min_coverage": 0.0, **settings, **more})


def _bytes(folder: Path) -> dict[str, bytes]:
    """What a compile wrote, but for its reports; hidden folders among it."""
    return {
        file.name: file.read_bytes() if file.is_file() else b""
        for file in sorted(folder.iterdir())
        if ".report." not in file.name
    }


def _story(report: Report) -> Settings:
    return {name: value for name, value in json.loads(report.to_json()).items() if name not in _OF_RUN}


@pytest.mark.parametrize("case", REUSED)
def test_the_same_bytes_without_the_walk(
    case: str, bench: Bench, segments: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    kind, first, second = REUSED[case]
    source, shelf = _source(bench, kind), bench.folder / "shelf"
    whole = _compiled(bench, source, "whole", second)
    assert segments
    assert not _compiled(bench, source, "first", first, checkpoints=shelf).reused
    (kept,) = shelf.iterdir()
    before = _bytes(kept)
    segments.clear()
    report = _compiled(bench, source, "out", second, checkpoints=shelf)
    assert not segments
    assert report.reused == str(shelf)
    assert report.resumed == "the end of the segments"
    assert [own.getMessage() for own in caplog.records if "that of an earlier compile" in own.getMessage()]
    assert "is an earlier compile's" in report.took
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")
    assert _story(report) == _story(whole)
    assert list(shelf.iterdir()) == [kept]
    assert _bytes(kept) == before, "whoever takes a walk changes nothing of it"


@pytest.mark.parametrize("case", READ)
def test_what_the_walk_reads_is_walked_for_anew(case: str, bench: Bench, segments: list[int]) -> None:
    kind, first, second = READ[case]
    source, shelf = _source(bench, kind), bench.folder / "shelf"
    _compiled(bench, source, "first", first, checkpoints=shelf)
    segments.clear()
    assert not _compiled(bench, source, "out", second, checkpoints=shelf).reused
    assert segments
    assert len(list(shelf.iterdir())) == 2


def test_an_interrupted_compile_goes_on_with_other_passes_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(bench, "decoder")
    _compiled(bench, source, "whole", {"passes": "smooth,pack,fuse"})
    with pytest.raises(qcompile.Verdict):
        _compiled(bench, source, "out", {"passes": "smooth,pack"}, min_cosine=1.0, checkpoints=bench.folder / "shelf")
    assert not (bench.folder / "shelf").exists(), "what was refused is beside the output"
    report = _compiled(bench, source, "out", {"passes": "smooth,pack,fuse"})
    assert report.resumed == "the end of the segments"
    assert not report.reused
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_the_steps_without_data_are_those_of_the_recipe(bench: Bench) -> None:
    """What is measured beside the walk follows the whole recipe, and is measured anew."""
    source, data, shelf = _source(bench, "decoder"), {"calibration": ["self"]}, bench.folder / "shelf"
    whole = _compiled(bench, source, "whole", {"passes": "smooth,pack,fuse", **data})
    _compiled(bench, source, "first", {"passes": "smooth,pack", **data}, checkpoints=shelf)
    report = _compiled(bench, source, "out", {"passes": "smooth,pack,fuse", **data}, checkpoints=shelf)
    assert report.reused
    assert report.ladder == whole.ladder
    assert report.ladder is not None


def _kept(bench: Bench) -> tuple[Path, Path, Path]:
    """(a model, a folder, the walk of it that is kept there)"""
    source, shelf = _source(bench, "decoder"), bench.folder / "shelf"
    _compiled(bench, source, "first", {"passes": "pack"}, checkpoints=shelf)
    (kept,) = shelf.iterdir()
    return source, shelf, kept


@pytest.mark.parametrize("name", ["checkpoint", "arrays", "tensors"])
def test_a_damaged_walk_is_begun_anew_and_replaced(name: str, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    source, shelf, kept = _kept(bench)
    (file,) = kept.glob(f"{name}*")
    file.write_bytes(file.read_bytes()[:-1])
    assert not _compiled(bench, source, "out", {"passes": "pack,fuse"}, checkpoints=shelf).reused
    assert "begun anew" in caplog.text
    assert _compiled(bench, source, "out", {"passes": "pack,fuse"}, checkpoints=shelf).reused


def test_other_kernels_walk_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Activations go on by the native kernels: an installation without them, or with another build, walks by itself."""
    source, shelf, settings = _source(bench, "decoder"), bench.folder / "shelf", {"passes": "smooth,gptq,pack"}
    for number, kernels in enumerate((b"one build", b"another", None), 1):
        library = tmp_path / "kernels.so"
        if kernels is None:
            library.unlink()
        else:
            library.write_bytes(kernels)

        def there() -> Path:
            if not library.is_file():  # noqa: B023  # called in this round
                raise UserError("none")
            return library  # noqa: B023

        with monkeypatch.context() as patched:
            for module in (program, native_kernels):
                patched.setattr(module, "library_path", there)
            patched.setattr(program, "chosen_kernel", lambda _: "avx2")
            assert not _compiled(bench, source, f"out{number}", settings, checkpoints=shelf).reused
            assert _compiled(bench, source, f"out{number}", settings, checkpoints=shelf).reused
        assert len(list(shelf.iterdir())) == number


def test_a_file_that_is_no_library_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one built for another system: passes compute without it, and a compile that runs no session goes on."""
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    monkeypatch.setenv(native_kernels.VARIABLE, str(other))
    assert program.machine()[-1] == "no native kernels"


def test_a_damaged_walk_leaves_an_interrupted_compile(bench: Bench) -> None:
    """What lies beside the output is gone on from where the walk on the shelf is not whole."""
    source, shelf, kept = _kept(bench)
    with pytest.raises(qcompile.Verdict):
        _compiled(bench, source, "out", {"passes": "pack"}, min_cosine=1.0, checkpoints=shelf)
    (kept / "checkpoint").unlink()  # which both have
    (kept / "checkpoint").write_bytes(b"")
    report = _compiled(bench, source, "out", {"passes": "pack"}, checkpoints=shelf)
    assert report.resumed
    assert not report.reused
    assert _compiled(bench, source, "out", {"passes": "pack"}, checkpoints=shelf).reused, "it was replaced"


def test_a_walk_that_is_replaced_while_it_is_taken_is_begun_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of two walks of one key are never mixed: tensors may lie otherwise in the other one."""
    source, shelf, kept = _kept(bench)
    share = finished._share

    def shared(file: Path, target: Path) -> None:
        share(file, target)
        if file == kept / "tensors":
            monkeypatch.setattr(finished, "_share", share)
            _compiled(bench, source, "other", {"passes": "pack"}, checkpoints=shelf, fresh=True)

    monkeypatch.setattr(finished, "_share", shared)
    report = _compiled(bench, source, "out", {"passes": "pack,fuse"}, checkpoints=shelf)
    assert not report.reused
    assert "is another one meanwhile" in caplog.text
    _compiled(bench, source, "whole", {"passes": "pack,fuse"})
    assert _bytes(bench.folder / "out") == _bytes(bench.folder / "whole")


def test_an_interrupt_while_a_walk_is_put_away_leaves_no_part_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finished, "_share", stopped)
    with pytest.raises(KeyboardInterrupt):
        _compiled(bench, _source(bench, "decoder"), "out", {"passes": "pack"}, checkpoints=bench.folder / "shelf")
    assert not list((bench.folder / "shelf").iterdir())
    assert (bench.folder / "out" / "model.onnx").is_file()


def test_a_folder_without_modes_keeps_no_walk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would not be trusted."""
    monkeypatch.setattr(finished, "is_own", lambda _: False)
    source, shelf = _source(bench, "decoder"), bench.folder / "shelf"
    _compiled(bench, source, "out", {"passes": "pack"}, checkpoints=shelf)
    assert f"the walk is not kept in {shelf}: others can write whatever is there" in caplog.text
    assert not list(shelf.iterdir())


def test_fresh_walks_and_replaces(bench: Bench, segments: list[int]) -> None:
    source, shelf, kept = _kept(bench)
    before = (kept / "checkpoint").stat().st_ino
    segments.clear()
    assert not _compiled(bench, source, "out", {"passes": "pack"}, checkpoints=shelf, fresh=True).reused
    assert segments
    assert list(shelf.iterdir()) == [kept]
    assert (kept / "checkpoint").stat().st_ino != before


def test_a_disk_without_links_has_copies(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def linked(file: Any, target: Any) -> None:
        if "shelf" in f"{file} {target}":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(file, target)

    monkeypatch.setattr(finished.os, "link", linked)
    source, shelf, kept = _kept(bench)
    assert (kept / "tensors").stat().st_nlink == 1
    assert _compiled(bench, source, "out", {"passes": "pack,fuse"}, checkpoints=shelf).reused


def test_a_full_disk_keeps_no_walk_and_ends_no_compile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(finished, "_share", full)
    source, shelf = _source(bench, "decoder"), bench.folder / "shelf"
    _compiled(bench, source, "out", {"passes": "pack"}, checkpoints=shelf)
    assert [own.getMessage() for own in caplog.records] == [f"the walk is not kept in {shelf}: No space left on device"]
    assert not list(shelf.iterdir())
    assert not list((bench.folder / "out").glob(".*"))


def test_a_place_for_no_folder_is_refused_before_the_work(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    source = _source(bench, "decoder")
    bench.refuses(capsys, source, ["--checkpoints", str(bench.text)], "--checkpoints .* is no folder")
    with pytest.raises(UserError, match=r"^checkpoints=.* is no folder"):
        qcompile.compile(source, "pack", checkpoints=bench.text / "in", output=bench.folder / "out.onnx")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qcompile.compiler.commands.compile.spending", None)  # a budget is chosen by what takes minutes
        bench.refuses(capsys, source, ["--budget", "5bpw", "--checkpoints", str(bench.text)], "is no folder")


def test_a_choice_that_is_too_large_leaves_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The next choice of formats begins anew, and would tell of an unfinished compile that nobody has stopped."""
    source, shelf = _source(bench, "decoder"), bench.folder / "shelf"
    with pytest.raises(TooLarge) as raised:
        compile_model(
            source,
            Recipe(parse_passes("pack"), min_coverage=0.0, samples=4, context=32),
            output=bench.folder / "out" / "model.onnx",
            calibration=Calibration([str(bench.text)]),
            checkpoints=shelf,
            chosen=Chosen(budget="0.001MB"),
        )
    assert not getattr(raised.value, "__notes__", [])
    assert not list((bench.folder / "out").iterdir())
    assert not shelf.exists()
    assert not caplog.records


def test_a_dry_run_tells_what_it_leaves_out(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoints", str(bench.folder / "shelf"), "--fresh", "--bench", "--dry-run"]
    assert bench.run(_source(bench, "decoder"), "--passes", "pack", *words) == 0
    told = capsys.readouterr().err
    for name in ("--checkpoints", "--fresh", "--bench"):
        assert f"{name} has no effect here: --dry-run compiles nothing" in told
    assert "--verify" not in told


def test_the_command_tells_what_was_reused(
    bench: Bench, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source, shelf = _source(bench, "decoder"), bench.folder / "shelf"
    words = ["--passes", "pack", "--calibration", str(bench.text), "--checkpoints", str(shelf)]
    assert bench.run(source, *words) == 0
    capsys.readouterr()
    assert bench.run(source, *words, "--attention", "plain") == 0
    (told,) = [own.getMessage() for own in caplog.records]
    assert re.fullmatch(rf"the walk is that of an earlier compile, which took \d+ s for it \({shelf}\)", told)
    assert "the walk through the segments is an earlier compile's" in capsys.readouterr().out


def test_nothing_is_kept_unasked(bench: Bench) -> None:
    source = _source(bench, "decoder")
    _compiled(bench, source, "out", {"passes": "pack"})
    assert not list((bench.folder / "out").glob(".*"))
    assert not (bench.folder / "shelf").exists()


def test_tensors_are_named_in_the_folder_that_took_them(bench: Bench) -> None:
    """Behind a taken walk no tensor is read from the shelf, which may go meanwhile."""
    source, shelf, _ = _kept(bench)
    restored, seen = Checkpoints._restored, list[Path]()

    def looked(self: Checkpoints, prepared: Any) -> Any:
        state = restored(self, prepared)
        tensors = (value.const_value for value in self._model.graph.initializers.values())
        seen.extend(Path(str(own.path)) for own in tensors if isinstance(own, ir.ExternalTensor))
        return state

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoints, "_restored", looked)
        assert _compiled(bench, source, "out", {"passes": "pack,fuse"}, checkpoints=shelf).reused
    assert any(path.name == "tensors" for path in seen)
    assert all(shelf not in path.parents for path in seen)
