"""compiler/report/page.py: everything is on the page, nothing is loaded, and no name breaks it."""

import re
from dataclasses import replace
from typing import Any

import pytest
from html_reports import HOSTILE, Page, node, report_of, sample_ranges
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.report.chart import chart
from qcompile.compiler.report.markup import Markup, cut, percent, text
from qcompile.compiler.report.nodes import node_rows
from qcompile.compiler.report.page import to_html
from qcompile.compiler.report.ranges import DRAWN, clipped_share
from qcompile.compiler.report.tied import Tied
from qcompile.compiler.results.errors import ActivationRange, NodeError, OutputError
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Decision, Reason

NAN = float("nan")


def _report(*packed: Decision) -> Report:
    return Report("a.onnx", "hash", {}, {}, decisions={"pack": list(packed)}, quantizers=("pack",))


def test_a_compiled_decoder_is_all_on_the_page(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "smooth,pack")
    page = Page(to_html(report))
    cells = page.cells()
    assert {d.node for d in report.decisions["pack"]} <= set(cells)
    assert {d.node for d in report.decisions["smooth"]} <= set(cells)
    assert {"int4 g32 asym", "int8 g32 asym"} <= set(cells)
    assert cells[cells.index("logits") + 1] == report.outputs[0].told
    assert report.data in page.told("dd")
    assert any(told.startswith("smooth: ") for told in page.told("summary"))
    assert page.told("title")[0] == "qcompile report: model.onnx"


def test_nodes_kept_for_their_sensitivity_are_counted_together() -> None:
    alone = "kept for its sensitivity"
    kept = [node(f"k{i}", Reason(alone, f"rank {i}, KL 0.{i} alone"), action="kept") for i in (1, 2)]
    light = [node(f"q{i}", Reason("int8 per channel, weights only", f"{alone}: rank {i}")) for i in (3, 4)]
    source = to_html(_report(*kept, *light))
    body = source[source.index('<section id="coverage"') : source.index('<section id="errors"')]
    assert body.count("<tr>") == 3, "the head and two rows"
    assert "rank" not in body
    assert "rank 4" in source, "each node says its own"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("int4", "int8"))), max_size=12))
def test_weights_are_counted_once_and_bytes_as_they_are_stored(read: list[tuple[str, str]]) -> None:
    """A head that is tied to an embedding and has another form is stored by itself: the page called it shared."""
    tied, size = Tied(), {"int4": 500, "int8": 1000}
    made = [Decision("n", "quantized", form, {"weight": w, "weights": 1000, "bytes": size[form]}) for w, form in read]
    assert sum(map(tied.weights, made)) == 1000 * len({weight for weight, _ in read})
    told = Tied()
    assert sum(told.nbytes(own) or 0 for own in made) == sum(size[form] for _, form in set(read))


def test_coverage_counts_nodes_by_operator_and_decision() -> None:
    report = _report(
        node("a", "int4 g128 asym"), node("b", "int4 g128 asym"), node("head", "int8 g128 asym", weight="table"),
        node("table", "int8 g128 asym", kind="Gather", weight="table"), node("c", "excluded", action="kept"),
        node("d", "no format", action="skipped"),
    )  # fmt: skip
    source = to_html(report)
    body = source[source.index('<section id="coverage"') : source.index('<section id="errors"')]
    rows = [re.split(r"<td[^>]*>", re.sub(r"<i [^>]*></i>", "", row))[1:] for row in body.split("<tr>")[2:]]
    assert [[cell.split("\n")[0] for cell in row] for row in rows] == [
        ["int4 g128 asym", "MatMul", "2", "2,000", "1.1 KB"],
        ["int8 g128 asym", "MatMul", "1", "1,000", "0.5 KB"],
        ["int8 g128 asym", "Gather", "1", "–", "shared"],
        ["float: excluded", "MatMul", "1", "1,000", "4.0 KB"],
        ["float: no format", "MatMul", "1", "1,000", "4.0 KB"],
    ]
    assert "75.0% of the MatMul weights quantized." in body
    assert "There was no weight of a product to quantize." in to_html(_report())


def test_what_became_of_a_node() -> None:
    report = _report(
        node("a", "int4 g32 asym"), node("b", "int8 g32 asym"), node("c", "excluded", action="kept"),
        node("conv", "no format for Conv", action="skipped", kind="Conv"), node("", "x", action="skipped"),
        node("", "x", action="skipped"),
    )  # fmt: skip
    report.decisions["static"] = [node("conv", "int8 static per channel", kind="Conv")]
    report.decisions["smooth"] = [Decision("v", "skipped", "no alpha")]
    report.nodes = [NodeError("b", 0.1, 0.0), NodeError("unknown", 0.2, 0.0, weights=5)]
    rows = node_rows(report)
    kinds = [(row.number, row.decision.node, row.kind) for row in rows]
    assert kinds == [
        (1, "a", "int4"), (2, "b", "int8"), (3, "c", "kept"), (4, "conv", "static"), (5, "", "skipped"),
        (6, "", "skipped"), (7, "unknown", "int8"),
    ]  # fmt: skip
    assert [row.error.error if row.error else None for row in rows] == [None, 0.1, None, None, None, None, 0.2]


def _tops(drawn: str, kind: str) -> list[float]:
    path = re.search(rf'<path class="{kind}" d="([^"]*)"', drawn)
    assert path is not None
    return [float(y) for y in re.findall(r"M[\d.]+ [\d.]+V([\d.]+)h", path[1])]


def test_bars_are_logarithmic_and_in_the_order_of_the_nodes() -> None:
    report = _report(*(node(name, "int4 g32 asym") for name in "abcdef"), node("g", "int8 g32 asym"))
    errors = (0.9, 0.09, 0.009, 0.001, 0.0, NAN)
    report.nodes = [NodeError(name, error, 0.0) for name, error in zip("abcdef", errors, strict=True)]
    drawn = chart(node_rows(report))
    first, second, third, *stubs = _tops(drawn, "k-int4")
    assert second - first == pytest.approx(third - second, abs=1)
    assert third - second == pytest.approx(220 / 3, abs=1), "three decades are 220 pixels high"
    assert stubs == [229, 229, 229], "the smallest error, one of zero and NaN are stubs of 3 pixels"
    assert _tops(drawn, "k-int8") == [229]
    told = Page(drawn).told("title")
    assert [line.splitlines()[0] for line in told] == ["#1 a", "#2 b", "#3 c", "#4 d", "#5 e", "#6 f", "#7 g"]
    assert "error 0.09" in told[1]


def test_points_show_what_int8_activations_add() -> None:
    report = _report(node("a", "int4 g32 asym"), node("b", "int4 g32 asym"))
    report.nodes = [NodeError("a", 0.1, 0.0, 0.05, 8), NodeError("b", 0.1, 0.0, 0.005, 16)]
    drawn = chart(node_rows(report))
    ys = [re.search(rf'class="{name}" d="M\d+ (\d+)h0"', drawn) for name in ("taken", "open")]
    assert all(ys)
    assert int(ys[1][1]) - int(ys[0][1]) == pytest.approx(220 / 2, abs=1)  # type: ignore[index]
    assert "added by int8 activations" in drawn
    assert "would be added; 16 bit kept" in drawn


def test_levels_of_matmulnbits_are_told_as_such() -> None:
    report = _report(node("a", "int4 g32 asym"), node("b", "int4 g32 asym"))
    report.recipe["target"] = "matmulnbits"
    report.nodes = [NodeError("a", 0.1, 0.0, 0.005, 8), NodeError("b", 0.1, 0.0, 0.05, 16)]
    page = to_html(report)
    assert "would be added; level 0 (float) kept" in page
    assert "activations: 1 nodes level 4 (int8), 1 level 0 (float), 2 measured" in page
    assert page.count("activations level 4 (int8)") == page.count("activations level 0 (float)") == 1
    assert "16 bit" not in page


def test_without_errors_there_is_no_chart() -> None:
    assert "<svg" not in chart(node_rows(_report(node("a", "excluded", action="kept"))))


@pytest.mark.parametrize(
    ("low", "high", "share"),
    [(0.0, 4.0, 0.0), (1.0, 3.0, 0.4), (0.5, 4.0, 0.05), (-9.0, 2.0, 0.7), (4.0, 5.0, 1.0), (NAN, 1.0, None)],
)
def test_the_clipped_share_counts_what_is_outside(low: float, high: float, share: float | None) -> None:
    seen = ActivationRange("v", low, high, 0.0, 4.0, "mse", (10, 20, 40, 30), (0.0, 1.0, 2.0, 3.0, 4.0))
    assert clipped_share(seen) == (share if share is None else pytest.approx(share, abs=1e-12))


def test_the_clipped_share_of_one_number_and_of_none() -> None:
    point = ActivationRange("v", 0.0, 1.0, 2.0, 2.0, "mse", (7,), (2.0, 2.0))
    assert clipped_share(point) == 1.0
    assert clipped_share(replace(point, high=2.0)) == 0.0
    assert clipped_share(replace(point, counts=(), edges=())) is None
    with pytest.raises(ValueError, match="2 edges for 2 counts of v"):
        replace(point, counts=(1, 2))


def test_cards_of_ranges_come_by_clipped_share() -> None:
    report = _report()
    report.ranges = sample_ranges()
    source = to_html(report)
    assert Page(source).told("figcaption") == ["relu", "mlp.tail", "attention.softmax", "plain"]
    for told in ("not counted", "0% clipped", "−8 … 9", "percentile"):
        assert told in source
    steps = re.findall(r'class="counts" d="M[\d.]+ \d+((?:V\d+H[\d.]+)+)V\d+z"', source)
    assert [step.count("H") for step in steps] == [43, 43, 43], "128 bins, three joined in one"


def test_a_range_lies_where_its_numbers_are() -> None:
    report = _report()
    report.ranges = [ActivationRange("v", 1.0, 3.0, 0.0, 4.0, "mse", (1, 0, 9), (0.0, 1.0, 3.0, 4.0))]
    source = to_html(report)
    assert 'class="range" d="M62.0 0V62M178.0 0V62"' in source, "a quarter and three quarters of 4 … 236"
    assert re.findall(r'class="clip" x="([\d.]+)" width="([\d.]+)"', source) == [("4.0", "58.0"), ("178.0", "58.0")]
    heights = re.search(r'class="counts" d="M4.0 62V(\d+)H62.0V(\d+)H178.0V(\d+)H236.0', source)
    assert heights is not None
    assert heights.groups() == ("45", "62", "6"), "log 2 / log 10 of 56, nothing, all of it"


def test_values_beyond_the_drawn_ones_are_in_a_table() -> None:
    report = report_of(DRAWN + 20)
    page = Page(to_html(report))
    assert page.tags.count("figure") == DRAWN
    assert "20 values that lose less" in page.told("caption")
    cells = page.cells()
    assert all(r.value in {*page.told("figcaption"), *cells} for r in report.ranges)


def _everywhere(word: str) -> Report:
    """A report with this text wherever a text can be."""
    packed = [node(word, word), node(word, word, action="kept", kind=word), node(word + "2", word, action=word)]
    report = Report(word, word, {"passes": [word], word[:9]: word, "list": [word]}, {word: word}, word)
    other = [Decision(word, word, word, {word: word, "linears": [word, word], "loss": 0.5, "yes": True})]
    report.decisions = {"pack": packed, word: other}
    report.nodes = [NodeError(word, 0.1, 0.0, 0.01, 8), NodeError(word + "3", 0.1, 0.0)]
    report.outputs, report.files = [OutputError(word, 0.1, 0.9)], [word]
    report.ranges = [ActivationRange(word, -1.0, 1.0, -2.0, 2.0, word, (1, 5, 1), (-2.0, -1.0, 1.0, 2.0))]
    return report


@pytest.mark.parametrize("word", HOSTILE, ids=["script", "image", "ends", "entities", "unprintable", "long"])
def test_no_text_adds_an_element_to_the_page(word: str) -> None:
    source, plain = to_html(_everywhere(word)), Page(to_html(_everywhere("plain word")))
    page = Page(source)
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert source.encode("utf-8").isascii() is False
    assert max(map(len, re.split(r"[<>]", re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.S)))) < 2500
    assert not set("\x00\u202e\ud800") & set(source)


def test_nothing_is_loaded_from_anywhere() -> None:
    source = to_html(_everywhere("https://example.org/x.js"))
    page = Page(source)
    targets = {value for name, value in page.attributes if name in {"src", "href", "action", "srcset", "data"}}
    assert targets == {"data:,", "#most", "#coverage", "#errors", "#nodes", "#ranges", "#decisions"}
    ids = {value for name, value in page.attributes if name == "id"}
    assert {target[1:] for target in targets if target.startswith("#")} <= ids
    assert not {"img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert (page.tags.count("script"), page.tags.count("link")) == (1, 1)
    assert "@import" not in source
    assert "url(" not in source
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in page.attributes)


def test_links_lead_only_to_what_is_there() -> None:
    for report in (_report(), _report(node("a", "int4 g32 asym")), report_of(3)):
        page = Page(to_html(report))
        ids = {value for name, value in page.attributes if name == "id"}
        links = {value for name, value in page.attributes if name == "href" and value.startswith("#")}
        assert {link[1:] for link in links} <= ids


def test_an_empty_report_is_a_page() -> None:
    page = Page(to_html(Report("", "", {}, {})))
    assert "No error of a node was measured." in page.told("p")
    assert "No pass made a decision." in page.told("p")


def test_nan_and_infinity_are_shown_as_they_are() -> None:
    report = _report(node("a", "int4 g32 asym"), node("b", "int4 g32 asym"))
    report.nodes = [NodeError("a", NAN, NAN, NAN, 8), NodeError("b", float("inf"), 0.1, None, 16)]
    report.outputs = [OutputError("y", NAN, NAN)]
    report.reload_error, report.seconds = NAN, NAN
    bad = (NAN, float("inf"), -float("inf"))
    report.ranges = [ActivationRange(f"r{v}", v, v, v, v, "minmax") for v in bad]
    report.ranges += [ActivationRange("c", NAN, 1.0, 0.0, 1.0, "mse", (1, 2), (0.0, 0.5, 1.0))]
    report.ranges += [ActivationRange("huge", -1.7e308, 1.7e308, 0.0, 0.0, "mse", (0, 0), (0.0, 0.0, 0.0))]
    source = to_html(report)
    cells = Page(source).cells()
    assert cells.count("nan") >= 4
    assert "inf" in cells
    drawn = re.findall(r'(?:d|x|y|width|height)="([^"]*)"', source)
    assert not [path for path in drawn if "nan" in path or "inf" in path]


def test_five_thousand_nodes_stay_below_five_megabytes() -> None:
    report = report_of(5000)
    source = to_html(report)
    assert len(source.encode()) < 5e6
    page = Page(source)
    assert page.told("title")[-1].startswith("#5000 ")
    assert {d.node for d in report.decisions["pack"]} <= set(page.cells())
    assert "4,000 more are in the JSON report." in page.told("p")
    assert len(to_html(report_of(5000, prefix="x" * 500)).encode()) < 8e6, "long names are cut"


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.0, "0%"), (1.0, "100%"), (0.9999, "99.9%"), (0.75, "75.0%"), (0.00012, "0.012%"), (1e-7, "1e-05%"),
        (None, "–"), (NAN, "nan"),
    ],
)  # fmt: skip
def test_percent_never_rounds_to_all_or_nothing(share: float | None, told: str) -> None:
    assert percent(share) == told


def test_text_is_escaped_once() -> None:
    assert text("a<b") == "a&lt;b"
    assert text(Markup("<b>")) == "<b>"
    assert text(text("<b>")) == "&lt;b&gt;"
    assert text("a\nb\u202e") == "a\\u000ab\\u202e"
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghijk", 10) == "abc…fghijk"
