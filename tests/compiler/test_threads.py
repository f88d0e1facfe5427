"""The number of threads changes no byte of what is compiled, where no sum of ONNX Runtime depends on it, as here."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from qcompile.compiler.cli import main
from qcompile.compiler.files.load import save_model
from qcompile.models.tiny import tiny_decoder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with weights of several chunks of columns, and text for it."""
    folder = tmp_path_factory.mktemp("threads")
    model = tiny_decoder(layers=1, hidden=96, heads=6, kv_heads=2, ffn=1200, vocab=1500, seed=3)
    save_model(model, folder / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 1500, (12, 64))
    np.savez(folder / "text.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    return folder


@pytest.mark.parametrize("passes", ["smooth,awq,gptq,pack", "smooth,awq,pack", "smooth,qdq"])
def test_threads_change_no_byte(source: Path, passes: str, tmp_path: Path) -> None:
    """Of the data file and the model, in one thread, in two, and in more than there are cores."""
    seen: dict[int, list[str]] = {}
    for threads in (1, 2, 3, 5):
        out = tmp_path / str(threads)
        command = [str(source / "model.onnx"), "--passes", passes, "--group-size", "32", "--threads", str(threads)]
        assert main([*command, "--calibration", str(source / "text.npz"), "-o", str(out / "model.onnx")]) == 0
        files = sorted(own for own in out.iterdir() if own.suffix in (".onnx", ".data"))
        seen[threads] = [hashlib.sha256(own.read_bytes()).hexdigest() for own in files]
    assert seen[1]
    assert all(own == seen[1] for own in seen.values())
