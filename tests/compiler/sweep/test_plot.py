"""compiler/sweep/plot.py: what is drawn, where labels go, and life without matplotlib."""

import io
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qcompile.compiler.sweep.labels import label_points, spread, within, wrapped
from qcompile.compiler.sweep.plot import best, draw, series
from qcompile.compiler.sweep.rows import DONE, OPEN, Row, Sweep
from qcompile.compiler.sweep.tables import INSTALL, write_plots, write_tables

PASSES = ("pack", "smooth,awq,pack")


def _made(**changed: Any) -> Sweep:
    """Two bits, three group sizes, symmetry and two lists, with made-up figures."""
    rows = []
    for bits in (4, 8):
        for size, more in (("channel", 0.0), ("128", 0.2), ("32", 0.6)):
            for symmetric in ("no", "yes"):
                for passes in PASSES:
                    error = 2.0 ** (-3 * bits) * (2 - more) * (1 + (symmetric == "yes")) / (1 + 3 * len(passes))
                    values = {"bits": str(bits), "group_size": size, "symmetric": symmetric, "passes": passes}
                    figures = {"bits_per_weight": bits + more, "scores": {"kl": error}}
                    rows.append(Row(len(rows) + 1, values, status=DONE, **figures))
    plain = {"error": "kl", "axis": "KL", "source": "a text", "note": "a remark", "rows": rows}
    made = Sweep(model="folder/model.onnx", model_hash="", base={}, versions={}, **(plain | changed))
    made.mark_pareto()
    return made


def test_a_series_is_every_setting_but_bits_and_group_size() -> None:
    found = series(_made())
    assert [one.label for one in found] == [
        f"{passes} {end}" for end in ("asymmetric", "symmetric") for passes in PASSES
    ]
    for one in found:
        assert {bits: [row.values["group_size"] for row in line] for bits, line in one.lines.items()} == {
            "4": ["channel", "128", "32"],
            "8": ["channel", "128", "32"],
        }
    assert [one.hollow for one in found] == [False, False, True, True]
    assert found[0].color == found[2].color != found[1].color
    assert len({str(one.style) for one in found}) == 4


def _formats() -> Sweep:
    """Four formats by two lists, of which mxfp4 has more bits and more error than int4."""
    figures = {"int3": (3.3, 0.5), "int4(group=64)": (4.3, 0.1), "mxfp4": (4.3, 0.2), "nvfp4": (4.5, 0.05)}
    rows = [
        Row(
            number,
            {"weights": weights, "passes": passes},
            status=DONE,
            bits_per_weight=bits,
            scores={"kl": error / (1 + 9 * ("awq" in passes))},
        )
        for number, (weights, (bits, error), passes) in enumerate((w, f, p) for w, f in figures.items() for p in PASSES)
    ]
    return _made(rows=rows)


def test_formats_are_points_of_one_series_whose_line_joins_the_best() -> None:
    sweep = _formats()
    found = series(sweep)
    assert [one.label for one in found] == list(PASSES)
    for one in found:
        (rows,) = one.lines.values()
        assert len(rows) == 4
        assert [row.values["weights"] for row in best(sweep, rows)] == ["int3", "int4(group=64)", "nvfp4"]


def test_every_point_of_a_format_is_named() -> None:
    drawn = draw(_formats())
    text = ["".join(node.itertext()) for node in ET.fromstring(drawn["svg"]).iter() if node.tag.endswith("text")]
    assert {name: text.count(name) for name in ("int3", "int4 g64", "mxfp4", "nvfp4")} == dict.fromkeys(
        ("int3", "int4 g64", "mxfp4", "nvfp4"), 2
    )
    assert not any("Each panel" in line for line in text)
    assert any("Each panel" in line for line in ET.fromstring(draw(_made())["svg"]).itertext())


@pytest.mark.parametrize("seed", range(3))
def test_names_of_points_do_not_lie_upon_each_other(seed: int) -> None:
    from matplotlib.figure import Figure

    axes, random = Figure(figsize=(9, 5)).subplots(), np.random.default_rng(seed)
    points = [((float(x), float(y)), f"format{i}", "k") for i, (x, y) in enumerate(random.random((12, 2)))]
    axes.plot(*zip(*(point for point, _, _ in points), strict=True), "o")
    axes.figure.draw_without_rendering()
    label_points(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_labels_keep_their_distance() -> None:
    assert spread([0.0, 10.0], 5.0) == [0.0, 10.0]
    assert spread([0.0, 1.0], 5.0) == [-2.0, 3.0]
    assert spread([1.0, 0.0], 5.0) == [3.0, -2.0]
    placed = spread([0.0, 1.0, 2.0, 30.0, 30.0, 33.0], 5.0)
    assert placed == pytest.approx([-4.0, 1.0, 6.0, 26.0, 31.0, 36.0])
    assert spread([], 5.0) == []


def test_names_stay_within_the_panel_and_break_at_commas() -> None:
    assert within([-4.0, 1.0, 6.0], 5.0, 0.0, 30.0) == [0.0, 5.0, 10.0]
    assert within([26.0, 31.0, 36.0], 5.0, 0.0, 30.0) == [20.0, 25.0, 30.0]
    assert within([5.0, 20.0], 5.0, 0.0, 30.0) == [5.0, 20.0]
    name = "smooth(alpha=0.5),outlier(count=8),awq,gptq,pack symmetric"
    lines = wrapped(name).split("\n")
    assert max(map(len, lines)) <= 22
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")


def test_nothing_lies_outside_of_the_picture() -> None:
    """Long names of lists, of the data and of the model, and a long remark: the frame of the picture is white."""
    long = "a sentence of a good many words that goes on and on, " * 4
    made = _made(source=long, note=long)
    made.model = f"{'a-long-folder-name-' * 4}/{'model-' * 5}.onnx"
    for row in made.rows:
        row.values["passes"] = f"smooth(alpha=0.5),outlier(count=8),{row.values['passes']}"
    image = Image.open(io.BytesIO(draw(made)["png"])).convert("L")
    pixels = np.asarray(image)
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all()


def test_the_picture_names_all_that_it_shows() -> None:
    drawn = draw(_made())
    assert drawn["png"].startswith(b"\x89PNG")
    text = " ".join(
        "".join(node.itertext()) for node in ET.fromstring(drawn["svg"]).iter() if node.tag.endswith("text")
    )
    assert text.count("pack") == 2 * 4, "every line is named in both panels"
    shown = (
        "int4",
        "int8",
        "asymmetric",
        "channel",
        "g128",
        "g32",
        "Pareto front",
        "a text",
        "a remark",
        "folder/model",
    )
    assert [word for word in shown if word not in text] == []
    assert draw(_made()) == drawn, "the same figures give the same bytes"


def test_one_row_and_an_error_of_zero_can_be_drawn() -> None:
    row = Row(1, {"seed": "0"}, status=DONE, bits_per_weight=4.5, scores={"kl": 0.0})
    assert set(draw(_made(rows=[row]))) == {"svg", "png"}


def test_nothing_to_draw_is_a_remark(tmp_path: Path) -> None:
    rows = [Row(1, {"bits": "4"}, status=OPEN), Row(2, {"bits": "8"}, status=DONE, scores={"kl": 0.1})]
    assert write_plots(_made(rows=rows), tmp_path) == ["no plot: no combination has quantized weights and figures yet"]
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = _made()
    write_tables(made, tmp_path)
    assert write_plots(made, tmp_path) == [INSTALL]
    assert "pip install 'qcompile-onnx[plot]'" in INSTALL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json", "table.md"]
