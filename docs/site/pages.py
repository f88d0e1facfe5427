"""The pages of the site: what is written, where links of the repository lead, and what is generated from declarations.

python docs/site/pages.py build/pages

README.md, docs/ and the results of benchmarks/ lie as they do in the repository, with the files that they link to; a
link that leads nowhere is an error. Generated: commands from their options, passes, observers and formats from their
tables, the Python reference from docstrings (by mkdocstrings, from the names of `qcompile`), and the notebook, run.
"""

import contextlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qcompile
from qcompile.compiler.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
_FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def written() -> list[Path]:
    """The Markdown files of the repository that are pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]


def linked(page: Path) -> Iterator[Path]:
    """Files that a page links to; ValueError for one that is not there, or lies outside of the repository."""
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:|#", link):
            continue
        file = (page.parent / link.partition("#")[0]).resolve()
        if not file.is_file() or not file.is_relative_to(ROOT):
            raise ValueError(f"{page.relative_to(ROOT)}: {link} leads to no file")
        yield file


def said(*words: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    if code:
        raise ValueError(f"qcompile {' '.join(words)} ended with {code}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def commands() -> str:
    """A page with the help of every command, as their options declare it."""
    parts = [f"## {name}\n\n```text\n{said(name, '--help')}\n```\n" for name in COMMANDS]
    return f"# Commands\n\n```text\n{said('--help')}\n```\n\n" + "\n".join(parts)


def passes() -> str:
    """A page with the tables of passes, observers and weight formats."""
    small = said("passes", "prepare")
    return (
        f"# Passes, observers and weight formats\n\n```text\n{said('passes')}\n```\n\n"
        f"## The small passes of prepare\n\n```text\n{small}\n```\n"
    )


def reference() -> str:
    """A page on which mkdocstrings documents every public name."""
    functions = [name for name in qcompile.__all__ if name in qcompile._HOMES and name[0].islower()]
    classes = [name for name in qcompile.__all__ if name in qcompile._HOMES and name[0].isupper()]
    parts = [f"::: {qcompile._HOMES[name]}.{name}\n" for name in (*functions, *classes)]
    return (
        "# Python reference\n\nAll of it can be imported from `qcompile`; examples: [From Python](python.md).\n\n"
        + "\n".join(parts)
    )


def notebook() -> str:
    """The notebook, run now, as Markdown."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    scratch = ROOT / "build" / "tour"
    scratch.mkdir(parents=True, exist_ok=True)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(scratch)}}).execute()
    parts = []
    for cell in book.cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: Any) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        plain = re.sub(r"<style.*?</style>| (border|class|style)=([\"']).*?\2", "", data["text/html"], flags=re.DOTALL)
        return re.sub(r"\n\s*", " ", plain)  # the site has its own style for tables
    if "image/png" in data:
        return f"![](data:image/png;base64,{data['image/png'].strip()})"
    text = output.get("text", "") if output.output_type == "stream" else data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def build(folder: Path) -> None:
    """All pages into a folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in written():
        for file in (page, *linked(page)):
            target = folder / file.relative_to(ROOT)
            if file != NOTEBOOK:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    for name, text in {
        "commands": commands(),
        "passes": passes(),
        "reference": reference(),
        "tour": notebook(),
    }.items():
        (folder / "docs" / f"{name}.md").write_text(text, encoding="utf-8")
    python = folder / "docs" / "python.md"
    python.write_text(python.read_text(encoding="utf-8").replace("tour.ipynb", "tour.md"), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
