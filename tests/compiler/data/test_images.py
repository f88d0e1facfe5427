"""compiler/data/images.py: image files in the size, the layout and the numbers that a model's input wants."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from PIL import Image

from qcompile.compiler.cli import main
from qcompile.compiler.data.calibration import Calibration, Data, Sampling, gather
from qcompile.compiler.data.images import Pictures
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.models.tiny import tiny_conv
from qcompile.passes.errors import UserError


def _plan(shape: list[Any], kind: int = TensorProto.FLOAT) -> InputPlan:
    node = helper.make_node("Identity", ["x"], ["y"])
    infos = [helper.make_tensor_value_info(name, kind, dims) for name, dims in (("x", shape), ("y", None))]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    return input_plan(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))


def _data(plan: InputPlan, folder: Path, *, samples: int = 32, pictures: Pictures = Pictures()) -> Data:  # noqa: B008
    given = Calibration([str(folder)], pictures=pictures)
    return gather(plan, folder / "model.onnx", Sampling(samples, 512), given, needed=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images of one colour each, 40 wide and 30 high: red is 10 times the number."""
    for number in range(5):
        Image.new("RGB", (40, 30), (number * 10, 100, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (["n", 3, 24, 16], (1, 3, 24, 16)),
        ([1, 24, 16, 3], (1, 24, 16, 3)),
        ([2, 3, 24, 16], (2, 3, 24, 16)),
        (["n", "c", "h", "w"], (1, 3, 32, 32)),
        (["n", "h", "w", 3], (1, 32, 32, 3)),
        ([3, 24, 16], (3, 24, 16)),
        ([24, 16, 3], (24, 16, 3)),
        (["n", 1, 24, 16], (1, 1, 24, 16)),
        (["n", 4, 24, 16], (1, 4, 24, 16)),
    ],
)
def test_layout_and_size_are_the_inputs(photos: Path, shape: list[Any], wanted: tuple[int, ...]) -> None:
    data = _data(_plan(shape), photos)
    assert [batch.feeds["x"].shape for batch in data.calibration] == [wanted] * (2 if shape[0] == 2 else 5)
    assert data.real


def test_numbers_are_those_of_the_training_and_the_report_says_which(photos: Path) -> None:
    plan = _plan(["n", 3, 8, 8])
    data = _data(plan, photos)
    wanted = [(20 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (200 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(data.calibration[2].feeds["x"][0, :, 4, 4], wanted, rtol=1e-5)
    assert data.description == (
        "5 images, 8×8 RGB, cropped to fit, channels first, (pixel·0.003922 - [0.485, 0.456, 0.406]) / "
        "[0.229, 0.224, 0.225] (ImageNet's mean and deviation)"
    )
    data = _data(plan, photos, pictures=Pictures(mean=(0.5,), std=(0.25,)))
    np.testing.assert_allclose(data.calibration[2].feeds["x"][0, 0], (20 / 255 - 0.5) / 0.25, rtol=1e-5)
    assert data.description.endswith("- 0.5) / 0.25 (as told)")
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "rescale_factor": 0.5, "size": {"shortest_edge": 8}}
    (photos / "preprocessor_config.json").write_text(json.dumps(told))
    data = _data(_plan(["n", 3, "h", "w"]), photos)
    np.testing.assert_allclose(data.calibration[2].feeds["x"][0, :, 4, 4], [9.9, 49.8, 99.7], rtol=1e-5)
    assert data.calibration[0].feeds["x"].shape == (1, 3, 8, 8)
    assert "preprocessor_config.json beside the model" in data.description


def test_integer_inputs_take_pixels(photos: Path) -> None:
    data = _data(_plan(["n", 8, 8, 3], TensorProto.UINT8), photos)
    assert data.calibration[4].feeds["x"][0, 0, 0].tolist() == [40, 100, 200]
    assert data.description.endswith("pixels 0 to 255")


@pytest.mark.parametrize("shape", [[1, 8, 8, 3], [1, 1, 8, 8]])
def test_sixteen_bits_a_pixel_become_eight(tmp_path: Path, shape: list[Any]) -> None:
    """Pillow's own conversion makes 255 of everything above."""
    Image.fromarray(np.full((8, 8), 0x4321, np.uint16)).save(tmp_path / "a.png")
    data = _data(_plan(shape, TensorProto.UINT8), tmp_path)
    assert set(data.calibration[0].feeds["x"].ravel().tolist()) == {0x43}


def test_words_about_images_are_no_data(photos: Path) -> None:
    for name in ("README.txt", "labels.txt", "boxes.jsonl"):
        (photos / name).write_text("red")
    assert len(_data(_plan(["n", 3, 8, 8]), photos).calibration) == 5
    assert len(_data(_plan(["n", 3, 8, 8]), photos / "1.png").calibration) == 1


def test_of_many_images_as_many_as_asked_for_are_spread_over_them(photos: Path) -> None:
    data = _data(_plan(["n", 3, 8, 8]), photos, samples=3, pictures=Pictures((0.0,), (1.0,)))
    reds = [float(batch.feeds["x"][0, 0, 0, 0] * 255) for batch in data.calibration]
    np.testing.assert_allclose(reds, [0, 20, 40], atol=1e-4)
    assert data.description.startswith("3 of 5 images, ")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (["n", 7], "images serve a model with one input of images, this one takes x"),
        (["n", 7, 24, 16], "has no axis of 1, 3 or 4 channels"),
        ([9, 3, 24, 16], "takes 9 images at a time, 5 were given"),
    ],
)
def test_models_that_take_no_images(photos: Path, shape: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _data(_plan(shape), photos)


def test_broken_images_settings_and_a_missing_pillow(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(["n", 3, 8, 8])
    for settings, message in (
        ({"mean": (0.1, 0.2)}, "2 image means"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"size": (0, 4)}, "height and width"),
    ):
        with pytest.raises(UserError, match=message):
            _data(plan, photos, pictures=Pictures(**settings))
    (photos / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png is not a readable image"):
        _data(plan, photos)
    real = builtins.__import__

    def without_pillow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(UserError, match="images need Pillow: pip install pillow"):
        _data(plan, photos)


@pytest.mark.parametrize(
    "told",
    [
        *("{", "[]", "\xff", '{"image_mean": [0.5]}', '{"image_mean": [0], "image_std": [0]}'),
        *('{"image_mean": ["x"], "image_std": [1]}', '{"image_mean": [NaN], "image_std": [1]}'),
        *('{"rescale_factor": "a", "image_mean": [0]}', '{"image_mean": [0], "image_std": [1], "size": -3}'),
        '{"image_mean": [0], "image_std": [1], "size": 1000000}',
    ],
)
def test_a_damaged_preprocessor_config_is_refused(photos: Path, told: str) -> None:
    """Means of ImageNet in the place of the training's would calibrate another network."""
    (photos / "preprocessor_config.json").write_text(told, encoding="latin-1")
    with pytest.raises(UserError, match=r"preprocessor_config\.json says nothing that can be used"):
        _data(_plan(["n", 3, "h", "w"]), photos)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [({"do_normalize": False}, 20 / 255), ({"image_mean": 0.5, "image_std": 0.25}, (20 / 255 - 0.5) / 0.25)],
)
def test_settings_that_preprocessor_configs_have(photos: Path, told: dict[str, Any], wanted: float) -> None:
    (photos / "preprocessor_config.json").write_text(json.dumps(told))
    data = _data(_plan(["n", 3, 8, 8]), photos)
    np.testing.assert_allclose(data.calibration[2].feeds["x"][0, 0], wanted, rtol=1e-5)


def test_a_size_that_the_input_does_not_take_is_refused(photos: Path) -> None:
    for size in ((8, 9), (16, 16)):
        with pytest.raises(UserError, match="takes images of 8×8, not of"):
            _data(_plan(["n", 3, 8, 8]), photos, pictures=Pictures(size=size))
    with pytest.raises(UserError, match="16384 at most"):
        Pictures(size=(8, 20000))
    assert _data(_plan(["n", 3, 8, 8]), photos, pictures=Pictures(size=(8, 8))).calibration


def test_a_folder_of_images_through_the_command_line(
    bench: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.save(tiny_conv())
    options = ["--image-size", "32,32", "--image-mean", "0.5", "--image-std", "0.5"]
    out = ["-o", str(bench.folder / "q.onnx")]
    assert main([str(path), "--passes", "qdq", "--calibration", str(photos), *options, *out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data 5 images, 32×32 RGB, cropped to fit, channels first, (pixel·0.003922 - 0.5) / 0.5 (as told)" in said


def test_an_option_that_is_repeated_adds_to_the_data(
    bench: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse would take the last one alone, without a word."""
    given = [word for number in range(3) for word in ("--calibration", str(photos / f"{number}.png"))]
    out = ["-o", str(bench.folder / "q.onnx")]
    assert main([str(bench.save(tiny_conv())), "--passes", "qdq", "--image-size", "32,32", *given, *out]) == 0
    assert "3 images" in capsys.readouterr().out


def test_eval_takes_images_too(bench: Any, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bench.save(tiny_conv()))
    assert main(["eval", path, "--against", path, "--data", str(photos)]) == 0
    assert "1.000000" in capsys.readouterr().out
    assert main(["eval", path, "--against", path, "--data", str(bench.folder / "none.txt")]) == 2
    assert "no array (.npz, .npy) and no image" in capsys.readouterr().err
