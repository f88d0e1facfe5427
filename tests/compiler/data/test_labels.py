"""compiler/data/labels.py: labels by the names of images, and files that hold no labels."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qcompile.compiler.data.labels import read_labels
from qcompile.passes.errors import UserError


def _file(folder: Path, text: str) -> Path:
    path = folder / "labels.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "images", "wanted"),
    [
        ("cat/1.png 0\ndog/1.png 1\n", ["d/dog/1.png", "d/cat/1.png"], [1, 0]),
        ("cat/1.png 0\ndog/1.png 1\n", ["/d/cat/1.png", "/d/dog/1.png"], [0, 1]),
        ("1.png 4\ndog/1.png 1\n", ["d/dog/1.png", "d/cat/1.png"], [1, 4]),
        ("/old/cat/1.png,0\n/old/dog/1.png,1\n", ["dog/1.png", "cat/1.png"], [1, 0]),
        ("cat\\1.png 0\ndog\\1.png 1\n", ["d/dog/1.png"], [1]),
        ("./a.png 2\na.png 2\n", ["d/a.png", "d/a.png"], [2, 2]),
    ],
)
def test_an_image_has_the_label_of_the_longest_end_of_its_path(
    tmp_path: Path, text: str, images: list[str], wanted: list[int]
) -> None:
    assert read_labels(_file(tmp_path, text), images).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "images", "told"),
    [
        ("1.png 0\n", ["cat/1.png", "dog/1.png"], r"1\.png may be .*cat/1\.png or dog/1\.png"),
        ("1.png 0\n1.png 1\n", ["cat/1.png"], r"several labels \(0, 1\)"),
        ("cat/1.png 0\ndog/1.png 1\n", ["1.png"], r"several labels \(0, 1\)"),
        ("cat/1.png 0\n", ["dog/1.png"], r"no label for dog/1\.png"),
    ],
)
def test_names_that_do_not_tell(tmp_path: Path, text: str, images: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_labels(_file(tmp_path, text), images)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.eye(3, dtype=np.int64), r"one class number a row: of one-hot rows save array\.argmax"),
        (np.eye(3, dtype=np.float32), "one-hot"),
        (np.array([0, -1]), "class -1, and classes count from 0 on"),
    ],
)
def test_arrays_that_are_no_labels(tmp_path: Path, array: npt.NDArray[np.int64], told: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=told):
        read_labels(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([[3], [0]]))
    assert read_labels(tmp_path / "b.npy").tolist() == [3, 0]
