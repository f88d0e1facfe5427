"""compiler/commands/idle.py: options that change nothing are told, and those that are not told change something."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from said import complaints

from qcompile.compiler.cli import main
from qcompile.compiler.commands import idle
from qcompile.compiler.recipe import Recipe
from qcompile.models.tiny import tiny_decoder

QUICK = ["--samples", "4", "--context", "32"]
# An option of packed weights with a value that is no default.
CHANGED = {
    "bits": ["--bits", "8"],
    "group_size": ["--group-size", "16"],
    "symmetric": ["--symmetric"],
    "weights": ["--weights", "nf4"],
    "activations": ["--activations", "8"],
    "scale_bits": ["--scale-bits", "16"],
    "attention": ["--attention", "plain"],
}


def _graph(path: Path) -> bytes:
    """The graph with its weights, without what it says of its recipe."""
    model = onnx.load(path)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def made(make_bench: Any) -> Any:
    own = make_bench("idle")
    own.save(tiny_decoder(layers=1))
    return own


@pytest.fixture(scope="module")
def plain(made: Any) -> dict[str, bytes]:
    """By list, what comes of the defaults."""
    return {passes: _graph(_compiled(made, passes)) for passes in ("qdq", "smooth,qdq", "dynamic")}


def _compiled(made: Any, passes: str, *more: str) -> Path:
    output = made.folder / "out.onnx"
    model = str(made.folder / "in" / "model.onnx")
    words = [model, "--passes", passes, "--calibration", str(made.text), *QUICK, "-o", str(output), *more]
    assert main(words) == 0
    return Path(output)


@pytest.mark.parametrize("passes", ["qdq", "smooth,qdq", "dynamic"])
@pytest.mark.parametrize("name", ["bits", "group_size", "symmetric", "activations", "attention"])
def test_what_is_said_to_have_no_effect_has_none(
    made: Any, plain: dict[str, bytes], capsys: pytest.CaptureFixture[str], passes: str, name: str
) -> None:
    changed = _compiled(made, passes, *CHANGED[name])
    told = complaints(capsys.readouterr().err)
    option = CHANGED[name][0]
    assert told == f"qcompile: note: {option} has no effect here: no pass of {passes} packs weights (pack does)\n"
    assert _graph(changed) == plain[passes]


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in ("activations", "attention", "scale_bits")])
def test_nothing_is_said_of_what_has_an_effect(made: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = _graph(_compiled(made, "pack", "--group-size", "32"))
    more = CHANGED[name] if name == "group_size" else [*CHANGED[name], *["--group-size", "32"] * (name != "weights")]
    after = _graph(_compiled(made, "pack", *more))
    assert complaints(capsys.readouterr().err) == ""
    assert after != before


@pytest.mark.parametrize(
    ("recipe", "given", "found"),
    [
        (Recipe(), {"bits", "group_size", "samples"}, set()),
        (Recipe(), {"accuracy_level", "keep_as"}, {"accuracy_level", "keep_as"}),
        (Recipe(target="matmulnbits"), {"accuracy_level"}, set()),
        (Recipe.from_dict({"weights": "nf4"}), {"weights", "group_size"}, {"group_size"}),
        (Recipe.from_dict({"passes": "smooth,qdq", "keep_worst": 3}), {"keep_as", "bits"}, {"bits"}),
        (Recipe(budget="4bpw", bits=8), {"bits", "group_size", "lm_head", "budget"}, {"bits", "group_size"}),
        (Recipe(budget="4bpw", lm_head=4), {"bits", "group_size", "symmetric", "weights"}, {"bits", "weights"}),
        (Recipe(budget="4bpw", weights_of=("lm_head=int6",)), {"bits", "group_size", "symmetric"}, {"bits"}),
        (Recipe(max_kl=0.1, bits=8), {"bits", "max_kl", "keep_as"}, {"bits", "keep_as"}),
        (Recipe.from_dict({"passes": "smooth,qdq", "max_kl": 0.1, "fastest": True}), {"fastest"}, {"fastest"}),
        (Recipe(max_kl=0.1, fastest=True), {"fastest"}, set()),
        (Recipe(fastest=True), {"fastest"}, set()),  # an error
        (Recipe(), {"fastest"}, set()),  # given as false
    ],
)
def test_settings(recipe: Recipe, given: set[str], found: set[str]) -> None:
    assert set(idle.of_recipe(recipe, given)) == found


def test_a_bound_kept_by_formats_keeps_no_node() -> None:
    told = idle.of_recipe(Recipe(max_kl=0.1), {"keep_as"})["keep_as"]
    assert told == "max_kl 0.1 is kept by formats, and no node in float"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--samples", "3"], "--samples has no effect here: arrays are taken as they are, all of them"),
        (["--image-size", "4,4"], "--image-size has no effect here: no images are given with --calibration"),
    ],
)
def test_data(made: Any, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (4, 16))
    np.savez(made.folder / "c.npz", input_ids=ids)
    model, out = str(made.folder / "in" / "model.onnx"), str(made.folder / "npz.onnx")
    data = ["--calibration", str(made.folder / "c.npz"), "--passes", "qdq", "-o", out]
    assert main([model, *data, *words]) == 0
    assert complaints(capsys.readouterr().err) == f"qcompile: note: {told}\n"
    assert main([model, *data, *words, "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert main([model, *data]) == 0
    assert complaints(capsys.readouterr().err) == ""


def test_other_commands(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(made.folder / "in" / "model.onnx")
    assert main(["generate", model, "--prompt", "a", "--max-tokens", "1", "--top-p", "0.5"]) == 0
    assert "--top-p has no effect here: --temperature 0 draws nothing" in capsys.readouterr().err
    np.savez(made.folder / "d.npz", input_ids=np.zeros((1, 8), np.int64))
    assert main(["eval", model, "--against", model, "--data", str(made.folder / "d.npz"), "--tokens", "9"]) == 0
    assert "--tokens has no effect here: --data is no text" in capsys.readouterr().err


def test_repeated_calibration_adds_up(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in "abc":
        np.savez(tmp_path / f"{name}.npz", input_ids=rng.integers(0, 256, (1, 8)))
    files = [["--calibration", str(tmp_path / f"{name}.npz")] for name in "abc"]
    model, out = str(made.folder / "in" / "model.onnx"), str(tmp_path / "o.onnx")
    assert main([model, "--passes", "qdq", "-o", out, *[word for pair in files for word in pair]]) == 0
    assert "3 batches" in capsys.readouterr().out
