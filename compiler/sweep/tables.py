"""The results of a sweep as files: JSON, CSV, a Markdown table, plots; and the table on the terminal."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from qcompile.compiler.console.document import strict
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import table
from qcompile.compiler.files.cache import write_atomically
from qcompile.compiler.sweep.rows import DONE, Row, Sweep, name

INSTALL = "no plot: matplotlib is not installed; pip install 'qcompile-onnx[plot]' and run the same command again"
_HEADS = {
    "kl": "KL", "kl_error": "±", "perplexity": "perplexity", "agreement": "same top-1",
    "relative_error": "rel. error", "sqnr": "SQNR dB", "cosine": "cosine",
}  # fmt: skip
_FORMATS = {"kl": ".5f", "kl_error": ".5f", "perplexity": ".4g", "agreement": ".2%", "relative_error": ".5f",
            "sqnr": ".2f", "cosine": ".6f"}  # fmt: skip


def write_tables(sweep: Sweep, folder: Path) -> None:
    """Write results.json, results.csv and table.md, each in one step."""
    sweep.mark_pareto()
    write_atomically(folder / "results.json", json.dumps(strict(asdict(sweep)), indent=1) + "\n")
    write_atomically(folder / "results.csv", _csv(sweep))
    write_atomically(folder / "table.md", markdown(sweep))


def write_plots(sweep: Sweep, folder: Path) -> list[str]:
    """Write accuracy.svg and accuracy.png; remarks on what could not be drawn."""
    if not any(row.bits_per_weight for row in sweep.done):
        return ["no plot: no combination has quantized weights and figures yet"]
    from qcompile.compiler.sweep.plot import draw

    try:
        drawn = draw(sweep)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return [INSTALL]
    for kind, content in drawn.items():
        write_atomically(folder / f"accuracy.{kind}", content)
    return []


def caption(sweep: Sweep) -> list[str]:
    """What the figures mean, line by line."""
    own = ", ".join(f"{_head(name)} {_number(name, value)}" for name, value in sweep.float_scores.items())
    lines = [
        f"model     {sweep.model}" + (f"; float: {own}" if own else ""),
        f"scored    {sweep.source}",
        f"error     {sweep.axis}; bits per quantized weight include scales and zero points; "
        "* no other row is better in both",
    ]
    return lines + ([f"note      {sweep.note}"] if sweep.note else [])


def terminal_table(sweep: Sweep) -> Table:
    """The rows for a terminal."""
    heads, rows = _cells(sweep)
    numbers = len(heads) - 1 - len(sweep.varying)
    made = table(*heads, numbers=numbers)
    for row in rows:
        made.add_row(*row)
    return made


def reasons(sweep: Sweep) -> list[str]:
    """A line for every row without figures."""
    told = [(name(row.values, sweep.varying), row) for row in sweep.rows if row.status != DONE]
    return [f"{words}: {row.status}{': ' if row.reason else ''}{row.reason}" for words, row in told]


def markdown(sweep: Sweep) -> str:
    """The table with its caption."""
    heads, rows = _cells(sweep)
    left = 1 + len(sweep.varying)
    lines = [heads, ["---"] * left + ["--:"] * (len(heads) - left), *rows]
    shown = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    told = "\n".join(f"- {line[:10].strip()}: {line[10:]}" for line in caption(sweep))
    left_out = "\n".join(f"- {line}" for line in reasons(sweep))
    return f"{shown}\n\n{told}\n" + (f"\nWithout figures:\n\n{left_out}\n" if left_out else "")


def _cells(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the rows with figures."""
    names = list(dict.fromkeys(score for row in sweep.done for score in row.scores))
    heads = ["", *sweep.varying, "bits/weight", "size", *map(_head, names), "seconds"]
    return heads, [_row(sweep, row, names) for row in sweep.ordered() if row.status == DONE]


def _row(sweep: Sweep, row: Row, names: Sequence[str]) -> list[str]:
    bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
    scores = [_number(name, row.scores[name]) if name in row.scores else "" for name in names]
    settings = [row.values[key] for key in sweep.varying]
    return ["*" if row.pareto else "", *settings, bits, megabytes(row.compiled_bytes), *scores, f"{row.seconds:.0f}"]


def _head(score: str) -> str:
    """The name of a score, behind which may be that of the text that it is of."""
    name, _, text = score.partition(" ")
    return f"{_HEADS.get(name, name)} {text}".strip()


def _number(score: str, value: float) -> str:
    """A score as people read it; an error too small for five digits in its own magnitude."""
    name = score.partition(" ")[0]
    small = name in ("kl", "kl_error", "relative_error") and 0 < abs(value) < 1e-3
    return format(value, ".2e" if small else _FORMATS.get(name, ".4g"))


def _csv(sweep: Sweep) -> str:
    """All rows and all keys, in order."""
    keys = list(sweep.rows[0].values)
    names = list(dict.fromkeys(score for row in sweep.done for score in row.scores))
    plain = ["status", "reason", "bits_per_weight", "compiled_bytes", "coverage", "seconds", "pareto", "data", "key"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", *keys, *names, *plain])
    for row in sweep.ordered():
        scores = [row.scores.get(name, "") for name in names]
        writer.writerow([row.number, *row.values.values(), *scores, *(getattr(row, name) for name in plain)])
    return text.getvalue()
