"""compiler/walk/saved_run.py: a saved file run segment by segment gives what one session of it gives."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.compiler.files.load import save_model
from qcompile.compiler.walk import saved_run, verify
from qcompile.compiler.walk.saved_run import by_segments, is_heavy
from qcompile.compiler.walk.segments import split
from qcompile.compiler.walk.verify_saved import read_saved
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError

# Hidden sizes from which weights, packed ones too, are large enough to make segments.
_SIZES: dict[str, Any] = {"layers": 3, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 256}


@pytest.mark.parametrize(
    ("passes", "model", "settings"),
    [
        ("pack", {}, {"bits": 4}),
        ("pack", {"tied": False, "dtype": "fp16"}, {"bits": 8}),
        ("pack", {}, {"target": "matmulnbits"}),
        ("pack", {}, {"lm_head": None, "embedding": None}),
        ("pack", {}, {"lm_head": 8, "embedding": 8}),
        ("awq,pack", {"kv_cache": True}, {}),
        ("rotate(judge=false),pack", {"kv_cache": True}, {}),  # every input is turned by one matrix
        ("dynamic", {}, {}),
        ("smooth,qdq", {}, {}),
    ],
)
def test_segments_give_what_one_session_gives(
    bench: Any, monkeypatch: pytest.MonkeyPatch, passes: str, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Outputs of check and of evaluation batches; caches go from a prompt to its decode step."""
    source, seen = bench.save(tiny_decoder(**_SIZES, **model)), []
    # ONNX Runtime on a CPU computes half precision in float32, and rounds at the ends of a session.
    within = 3e-3 if model.get("dtype") == "fp16" else 1e-5

    def both(path: Path, plan: Any, batches: Any, provider: str, optimize: bool, *, floats: Any = (), **_: Any) -> Any:
        more: list[list[Any]] = [[], []]
        found = [
            run(
                path,
                plan,
                batches,
                provider,
                False,
                floats=floats,
                more=(*batches[:1],) * 2,
                each=lambda _, outputs, m=m: m.append(outputs),
            )
            for run, m in zip((verify.run_file, by_segments), more, strict=True)
        ]
        seen.append(len(split(read_saved(path), is_heavy)))
        for whole, parts in (*zip(*found, strict=True), *zip(*more, strict=True)):
            assert whole.keys() == parts.keys()
            for name, wanted in whole.items():
                np.testing.assert_allclose(parts[name], wanted, rtol=0, atol=within * np.abs(wanted).max())
        assert len(more[1]) == 2
        return verify.run_file(path, plan, batches, provider, optimize, floats=floats)

    monkeypatch.setattr("qcompile.compiler.pipeline.run_saved", both)
    bench.compile(source, passes, **settings)
    assert min(seen) >= 6, "a layer is two segments"


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.2.self_attn", "lm_head"])
def test_a_fault_in_any_segment_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The file is damaged before it runs; segments see the outputs that a whole session sees."""
    source = bench.save(tiny_decoder(**_SIZES, tied=False))
    monkeypatch.setattr(saved_run, "WHOLE", 0)

    def damaged(path: Path, *rest: Any, **named: Any) -> Any:
        model = read_saved(path)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if name.startswith(where) and tensor is not None and tensor.nbytes > 4096:
                with open(tensor.path, "r+b") as file:  # type: ignore[attr-defined]
                    file.seek(tensor.offset)  # type: ignore[attr-defined]
                    file.write(bytes(tensor.nbytes))
        return by_segments(path, *rest, **named)

    monkeypatch.setattr(saved_run, "by_segments", damaged)
    with pytest.raises(UserError, match=r"saved file differs from the verified graph|is destroyed"):
        bench.compile(source, "pack")


def test_a_large_file_is_never_one_session(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size counts all data files; the report is the same but for what floats round."""
    source = bench.save(tiny_decoder(**_SIZES))
    whole = bench.compile(source, "pack")
    monkeypatch.setattr(saved_run, "WHOLE", 300_000)
    monkeypatch.setattr(saved_run, "run_file", None)
    parts = bench.compile(source, "pack")
    assert parts.outputs[0].relative == pytest.approx(whole.outputs[0].relative, rel=1e-4)


def test_what_is_small_is_one_session(tmp_path: Path) -> None:
    save_model(tiny_decoder(), tmp_path / "m.onnx")
    assert saved_run.is_whole(tmp_path / "m.onnx")


def test_a_large_file_that_runtime_does_not_take_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are graphs of their own: what the file as a whole says of its values, none of them sees."""
    monkeypatch.setattr(saved_run, "WHOLE", 0)

    def run(path: Path, *rest: Any, **named: Any) -> Any:
        proto = onnx.load(path, load_external_data=False)
        proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
        onnx.save(proto, path)
        return saved_run.run_saved(path, *rest, **named)

    monkeypatch.setattr("qcompile.compiler.pipeline.run_saved", run)
    with pytest.raises(UserError, match="cannot load it"):
        bench.compile(bench.save(tiny_decoder()), "pack")
