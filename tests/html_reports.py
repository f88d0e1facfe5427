"""Reports for the tests of the HTML page, and the page taken apart."""

from html.parser import HTMLParser

import numpy as np

from qcompile.compiler.results.errors import ActivationRange, NodeError, OutputError
from qcompile.compiler.results.report import Report
from qcompile.passes.base import Decision

# Texts that break a page that forgets to escape one of them, cut one, or write one as UTF-8.
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</title></style></table></svg><h1>",
    "--> &amp; &lt;b&gt; ]]>",
    "right to left \u202e and \x00 zero\nline \ud800",
    "/layer" * 20_000,
)


def observed(value: str, numbers: np.ndarray, low: float, high: float, observer: str = "entropy") -> ActivationRange:
    """The range of a value that took these numbers, with a histogram of 128 bins."""
    counts, edges = np.histogram(numbers, bins=128)
    ends = float(numbers.min()), float(numbers.max())
    return ActivationRange(value, low, high, *ends, observer, tuple(counts.tolist()), tuple(edges.tolist()))


def sample_ranges() -> list[ActivationRange]:
    """A heavy tail with one outlier, two-sided; shares, as of a softmax; rectified; one without a histogram."""
    rng = np.random.default_rng(0)
    tail = np.append(rng.standard_t(3, 20_000), 300.0)
    return [
        observed("mlp.tail", tail, -8.0, 9.0, "percentile"),
        observed("attention.softmax", rng.dirichlet(np.full(40, 0.2), 500).ravel(), 0.0, 1.0),
        observed("relu", np.maximum(rng.normal(0.3, 1, 20_000), 0), 0.0, 2.5),
        ActivationRange("plain", -2.0, 3.0, -2.0, 3.0, "minmax"),
    ]


def _format(told: str) -> str:
    """The typed format of a decision that is told so."""
    return "static" if "static" in told else next((own for own in ("int4", "int8") if told.startswith(own)), "")


def node(name: str, told: str, *, action: str = "quantized", kind: str = "MatMul", weight: str = "") -> Decision:
    """What `pack` says of a node with a weight of 1000 elements."""
    size = {"bytes": 540, "bits_per_weight": 4.3125} if action == "quantized" else {}
    detail = {"kind": kind, "weights": 1000, "weight": weight or name, **size}
    return Decision(name, action, told, detail, _format(told) if action == "quantized" else "")


def report_of(count: int, *, prefix: str = "/model/layers/self_attn/q_proj/MatMul") -> Report:
    """A report of `count` nodes of all kinds, as many decisions of two other passes, and as many ranges."""
    rng, names = np.random.default_rng(0), [f"{prefix}_{i}" for i in range(count)]
    formats = ("int4 g128 asym", "int4 g128 asym", "int8 g128 asym", "int8 static")
    packed = [node(name, formats[i % 4]) for i, name in enumerate(names)]
    packed[5::10] = [node(name, "excluded", action="kept") for name in names[5::10]]
    packed[7::10] = [node(name, "no format for Conv", action="skipped", kind="Conv") for name in names[7::10]]
    detail = {"kind": "norm", "linears": names[:3], "relative_loss": 0.71}
    smooth = [Decision(name, "folded", "alpha=0.6", detail) for name in names]
    report = Report("/m/model.onnx", "ab" * 32, {"passes": ["smooth", "awq", "pack"], "bits": 4}, {"onnx": "1.23.2"})
    report.decisions, report.quantizers = {"smooth": smooth, "awq": smooth, "pack": packed}, ("pack",)
    errors, added = np.exp(rng.normal(-3, 0.7, count)).tolist(), np.exp(rng.normal(-5, 0.5, count)).tolist()
    report.nodes = [
        NodeError(d.node, errors[i], 1e-7, added[i], 8 + 8 * (i % 2), 1000)
        for i, d in enumerate(packed)
        if d.action == "quantized"
    ]
    report.outputs, report.files = [OutputError("logits", 0.039, 0.99935)], ["model.onnx", "model-1.data"]
    report.source_bytes, report.compiled_bytes, report.data = 10**9, 10**8, "4 windows of 512 tokens"
    tail = sample_ranges()[0]
    report.ranges = [
        ActivationRange(name, tail.low, tail.high, -9.0, 300.0, "mse", tail.counts, tail.edges) for name in names
    ]
    return report


class Page(HTMLParser):
    """A page taken apart: its tags in order, all attributes, the text of every kind of element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more element; text that follows is its own."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.texts.setdefault(tag, []).append("")
        self._inside = tag

    def handle_data(self, data: str) -> None:
        """Text belongs to the element opened last: enough for cells, captions and titles."""
        if self._inside:
            self.texts[self._inside][-1] += data

    def told(self, tag: str) -> list[str]:
        """The text of every element of this kind."""
        return [text.strip() for text in self.texts.get(tag, [])]

    def cells(self) -> list[str]:
        """What stands in table cells, behind a square of colour too."""
        return self.told("td") + self.told("i")
