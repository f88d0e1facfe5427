"""docs/python.md and the notebook: every example runs, in order. The site: every link leads somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qcompile
from qcompile.compiler.files.load import save_model
from qcompile.models.text import calibration_text
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_tokenizer

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = (DOCS / "python.md").read_text(encoding="utf-8")
_EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_TABLE = re.compile(r"^\| ([`\w, ]+) \| `qcompile", re.MULTILINE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the examples leave, run as one program where the files that they name are."""
    folder = tmp_path_factory.mktemp("python")
    save_model(tiny_decoder(layers=1), folder / "decoder" / "model.onnx")
    tiny_tokenizer(256, folder / "decoder")
    save_model(tiny_conv(), folder / "detector.onnx")
    (folder / "my-text.txt").write_text(calibration_text()[:6000], encoding="utf-8")
    (folder / "other-text.txt").write_text(calibration_text()[6000:9000], encoding="utf-8")
    images = pytest.importorskip("PIL.Image", reason="the extra images")
    (folder / "images").mkdir()
    for number in range(4):
        images.new("RGB", (40, 40), (60 * number, 90, 200 - 50 * number)).save(folder / "images" / f"{number}.png")
    names: dict[str, Any] = {"__name__": "__main__", "folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in enumerate(_EXAMPLE.findall(TEXT), 1):
            exec(compile(code, f"docs/python.md, example {number}", "exec"), names)
    return names


def test_the_examples_do_what_they_say(ran: dict[str, Any]) -> None:
    assert 0 < ran["kl"] < 1
    assert {row.scores.model for row in ran["table"].rows} == {"int4", "int8"}
    assert 0 < ran["judged"].rows[0].scores.classes.top1 <= 1
    assert len(ran["hardest"]) == 3
    assert ran["everything"]["coverage"] == ran["report"].coverage
    assert ran["best"].scores["kl"] <= min(row.scores["kl"] for row in ran["result"].done)
    assert ran["scores"].shape == (1, 7)
    assert (ran["folder"] / "small" / "own-text.report.html").is_file()
    assert not (ran["folder"] / "small" / "other.onnx").exists()


def test_every_function_is_in_the_table() -> None:
    (told,) = re.findall(r"\| function \| command \|\n.*?\n\n", TEXT, re.DOTALL)
    jobs = {name for name in qcompile.__all__ if name.islower() and callable(getattr(qcompile, name))}
    helpers = {"load_recipe", "save_recipe", "library_path", "custom_operators"}
    assert set(re.findall(r"`([a-z_]+)`", told)) == jobs - helpers
    for name in helpers:
        assert f"qcompile.{name}(" in TEXT or name == "load_recipe", name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs the extra docs")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs the extra docs")
    pytest.importorskip("ipykernel", reason="the notebook needs the extra docs")
    book = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    nbformat.validate(book)
    assert not [cell for cell in book.cells if cell.get("outputs")], "the site has it run; the file has no outputs"
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert sum("text/html" in output.get("data", {}) for output in shown) >= 5
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert (tmp_path / "small" / "int8.onnx").is_file()


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """docs/site/pages.py."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "site" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_link_of_every_page_leads_to_a_file(pages: ModuleType) -> None:
    found = {page: list(pages.linked(page)) for page in pages.written()}
    assert sum(map(len, found.values())) > 60
    assert DOCS / "examples" / "generate.cpp" in found[DOCS / "deploy.md"]


@pytest.mark.parametrize("link", ["nowhere.md", "../README.md/x", "/etc/passwd", "site"])
def test_a_link_that_leads_nowhere_is_told(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "site").mkdir()
    page = tmp_path / "a.md"
    page.write_text(f"[fine](a.md#top) [web](https:x)\n```\n[no](link)\n```\n[bad]({link})\n")
    with pytest.raises(ValueError, match=rf"a\.md: {link} leads to no file"):
        list(pages.linked(page))


def test_generated_pages_have_what_is_declared(pages: ModuleType) -> None:
    assert "--group-size" in pages.commands()
    assert "bias_correction" in pages.passes()
    for name in qcompile._HOMES:
        assert f".{name}\n" in pages.reference()


def test_every_page_of_docs_is_in_the_navigation(pages: ModuleType) -> None:
    """`make docs` is strict about it, too; pages of benchmarks/ are there by themselves."""
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (docs/[\w-]+\.md)$", text, re.MULTILINE))
    generated = {f"docs/{name}.md" for name in ("commands", "passes", "reference", "tour")}
    assert listed == {page.relative_to(DOCS.parent).as_posix() for page in DOCS.glob("*.md")} | generated
