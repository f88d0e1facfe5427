"""The HTML report in a real browser (headless Chromium): drawn, coloured, sorted, filtered; no error, no request."""

import json
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from html_reports import HOSTILE, Page, report_of, sample_ranges

from qcompile.compiler.report.page import to_html
from qcompile.compiler.report.style import POLICY

pytestmark = pytest.mark.slow

Pixels = npt.NDArray[np.uint8]
# As the style sheet has them: 4 bits, 8 bits, static int8, the background.
LIGHT = {"int4": "1f6fc4", "int8": "b35900", "static": "1a7f5a", "kept": "7a828c", "back": "ffffff"}
DARK = {"int4": "58a6ff", "int8": "f0a04b", "static": "4cc38a", "kept": "8b949e", "back": "12161c"}
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
# What Chromium asks its maker for at a start, in spite of the flags; no page of a test names these hosts.
_OWN = re.compile(r"^(\w+://)?[\w.-]+\.(google|googleapis|gvt1)\.com[:/]")


@dataclass
class Browser:
    """A browser whose every request over a network goes to a proxy that notes and refuses it."""

    program: str
    folder: Path
    proxy: int
    requests: list[str] = field(default_factory=list)

    def dump(self, source: str) -> tuple[str, list[str]]:
        """The document after its scripts, and the lines of the console."""
        done = self._run(source, "--dump-dom")
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    def picture(self, source: str, width: int, height: int, *flags: str, part: str) -> Pixels:
        """A screenshot (height, width, 3) of one part of the page."""
        image, alone = self.folder / "shot.png", f"<style>main>:not(#{part}){{display:none}}</style></head>"
        size = f"--window-size={width},{height}"
        self._run(source.replace("</head>", alone), f"--screenshot={image}", size, *flags)
        return read_png(image)

    def _run(self, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
        page = self.folder / "page.html"
        page.write_text(source, encoding="utf-8")
        own = (f"--user-data-dir={self.folder / 'profile'}", f"--proxy-server=127.0.0.1:{self.proxy}")
        command = [self.program, *_FLAGS, *own, "--proxy-bypass-list=<-loopback>", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)}")
    made = Browser(program, tmp_path, 0)

    class Refuse(BaseHTTPRequestHandler):
        def _note(self) -> None:
            if not _OWN.match(self.path):
                made.requests.append(self.path)
            self.send_error(403)

        do_GET = do_HEAD = do_POST = do_CONNECT = _note

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    made.proxy = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def read_png(path: Path) -> Pixels:
    """The pixels (height, width, 3) of a PNG of 8 bits without interlacing (PNG specification, section 9)."""
    data, at, packed, head = path.read_bytes(), 8, b"", b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        head = body if kind == b"IHDR" else head
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", head)
    assert (depth, interlaced) == (8, 0)
    step = {2: 3, 6: 4}[colour]
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * step)
    above = np.zeros((width, step), np.int64)
    rows = []
    for line in lines:
        above = _unfiltered(int(line[0]), line[1:].reshape(width, step).astype(np.int64), above)
        rows.append(above[:, :3].astype(np.uint8))
    return np.stack(rows)


def _unfiltered(method: int, line: npt.NDArray[np.int64], above: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if method in (0, 2):
        return (line + (above if method else 0)) & 255
    if method == 1:
        return np.cumsum(line, axis=0) & 255
    left, corner, out = np.zeros_like(line[0]), np.zeros_like(line[0]), np.empty_like(line)
    for x, up in enumerate(above):
        guess = (left + up) // 2
        if method == 4:
            a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
        out[x] = left = (line[x] + guess) & 255
        corner = up
    return out


def _share(pixels: Pixels, colour: str) -> float:
    """The share of pixels of exactly this colour."""
    return float((pixels == np.frombuffer(bytes.fromhex(colour), np.uint8)).all(axis=2).mean())


def _with_script(source: str, script: str) -> str:
    """The page without its policy, and with one more script behind its own."""
    return source.replace(f'content="{POLICY}"', "").replace("</body>", f"<script>{script}</script></body>")


def _without_scripts(source: str) -> str:
    return source.replace(POLICY, "default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_the_page_is_read_without_an_error_or_a_request(browser: Browser) -> None:
    report = report_of(40)
    report.ranges = sample_ranges()
    dom, console = browser.dump(to_html(report))
    assert console == []
    assert browser.requests == []
    assert '<html lang="en" class="scripted">' in dom, "the policy lets its own script run"
    page = Page(dom)
    assert page.tags.count("button") == 9, "a head of the table of nodes is a button"
    assert {d.node for d in report.decisions["pack"]} <= set(page.cells())
    assert page.tags.count("figure") == 4
    hits = dom[dom.index('<g class="hit">') :].split("</g>")[0]
    assert hits.count("<path") == 40


def test_errors_and_requests_would_be_seen(browser: Browser) -> None:
    _, console = browser.dump('<img src="http://tracker.example/x.png"><script>missing()</script>')
    assert browser.requests == ["http://tracker.example/x.png"]
    assert "missing is not defined" in console[0]


@pytest.mark.parametrize("word", HOSTILE[:5], ids=["script", "image", "ends", "entities", "unprintable"])
def test_a_hostile_name_runs_nothing(browser: Browser, word: str) -> None:
    plain, hostile = (to_html(report_of(12, prefix=prefix)) for prefix in ("plain", word))
    assert Page(browser.dump(hostile)[0]).tags == Page(browser.dump(plain)[0]).tags
    dom, console = browser.dump(hostile)
    assert (console, browser.requests) == ([], [])
    assert "scripted" in dom


@pytest.mark.parametrize(
    ("width", "flags", "colours"),
    [(1100, (), LIGHT), (1100, ("--blink-settings=preferredColorScheme=0",), DARK), (400, (), LIGHT)],
    ids=["wide", "dark", "narrow"],
)
def test_bars_are_drawn_in_their_colours(
    browser: Browser, width: int, flags: tuple[str, ...], colours: dict[str, str]
) -> None:
    pixels = browser.picture(to_html(report_of(200)), width, 420, *flags, part="errors")
    assert pixels.shape == (420, width, 3)
    assert 0.3 < _share(pixels, colours["back"]) < 0.95
    assert _share(pixels, colours["int4"]) > 0.02
    assert _share(pixels, colours["int8"]) > 0.01
    assert _share(pixels, colours["static"]) > 0.01
    assert 0 < _share(pixels, colours["kept"]) < 0.01, "stubs"


def test_ranges_are_drawn(browser: Browser) -> None:
    report = report_of(12)
    report.ranges = sample_ranges()
    pixels = browser.picture(to_html(report), 1100, 420, part="ranges")
    assert _share(pixels, LIGHT["int4"]) > 0.005, "histograms"
    assert _share(pixels, "c2255c") > 0.0001, "lines of the range, less their soft edges"


def test_it_reads_without_scripts_too(browser: Browser) -> None:
    source = _without_scripts(to_html(report_of(40)))
    dom, console = browser.dump(source)
    assert "scripted" not in dom.split(">")[1]
    assert "Content Security Policy" in console[0]
    assert _share(browser.picture(source, 1100, 420, part="errors"), LIGHT["int4"]) > 0.02
    shown = [browser.picture(page, 1100, 200, part="nodes") for page in (source, to_html(report_of(40)))]
    assert (shown[0] != shown[1]).any(), "the box to filter with is hidden where it would not work"


def test_the_table_filters_and_sorts(browser: Browser) -> None:
    script = """
    const rows = [...document.querySelectorAll('#all-nodes tbody tr')], heads = document.querySelectorAll('th button');
    const box = document.querySelector('input[data-table]');
    box.value = 'INT8 static'; box.dispatchEvent(new Event('input'));
    const left = rows.filter(row => !row.hidden).length, told = document.querySelector('output').textContent;
    const body = rows[0].parentNode, column = i => [...body.rows].map(row => row.cells[i].textContent.trim());
    heads[6].click(); const up = column(6); heads[6].click(); const down = column(6);
    const sorted = heads[6].parentNode.getAttribute('aria-sort');
    heads[0].click();
    const select = document.querySelector('select'); select.value = 'name'; select.dispatchEvent(new Event('change'));
    const cards = [...document.querySelectorAll('figcaption')].map(card => card.textContent.trim());
    const found = document.createElement('pre');
    found.textContent = JSON.stringify([left, told, up, down, sorted, column(0), cards]);
    document.body.append(found);
    """
    report = report_of(40)
    report.ranges = sample_ranges()
    dom, console = browser.dump(_with_script(to_html(report), script))
    assert console == []
    left, told, up, down, direction, numbers, cards = json.loads(Page(dom).told("pre")[-1])
    static = sum(d.reason == "int8 static" for d in report.decisions["pack"])
    assert (left, told) == (static, f"{static} of 40")
    errors = [f"{value:.3g}" for value in sorted(node.error for node in report.nodes)]
    assert [value for value in up if value != "–"] == errors
    assert up[0] == "–"
    assert [value for value in down if value != "–"] == errors[::-1]
    assert direction == "descending"
    assert numbers == [str(i) for i in range(1, 41)]
    assert cards == ["attention.softmax", "mlp.tail", "plain", "relu"]


def test_five_thousand_nodes_open_in_seconds(browser: Browser) -> None:
    script = "document.body.offsetHeight; document.title = 'laid out in ' + Math.round(performance.now()) + ' ms'"
    dom, _ = browser.dump(_with_script(to_html(report_of(5000)), script))
    found = re.search(r"laid out in (\d+) ms", dom)
    assert found is not None
    print(found[0])
    assert int(found[1]) < 15_000
