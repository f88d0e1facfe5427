"""The report as one HTML page that needs no network: what was done, node by node, and at what error."""

import math
from pathlib import Path

from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.recipe import SETTINGS
from qcompile.compiler.report.advice import packs
from qcompile.compiler.report.chart import chart
from qcompile.compiler.report.decisions import decisions
from qcompile.compiler.report.frontier import frontier
from qcompile.compiler.report.hurting import hurts
from qcompile.compiler.report.markup import Markup, join, number, percent, table, text
from qcompile.compiler.report.nodes import coverage, node_list, node_rows
from qcompile.compiler.report.phases import waterfall
from qcompile.compiler.report.ranges import ranges
from qcompile.compiler.report.steps import steps
from qcompile.compiler.report.style import POLICY, SCRIPT, STYLE
from qcompile.compiler.results.report import Report


def to_html(report: Report) -> str:
    """The whole page: readable in light and dark, without scripts too, whatever the names in the model are."""
    rows = node_rows(report)
    title = text(f"qcompile report: {Path(report.source).name}")
    worst = hurts(report)
    parts = {"What hurts most": worst} if worst is not None else {}
    parts |= {"Frontier": frontier(report.frontier)} if report.frontier is not None else {}
    parts |= {"Coverage": coverage(report, rows), "Errors": chart(rows)}
    if rows:
        parts["Nodes"] = node_list(rows)
    if report.ranges:
        parts["Activation ranges"] = ranges(report.ranges)
    parts |= steps(report)
    if report.phases:
        parts["Phases"] = waterfall(report.phases)
    parts["Decisions"] = decisions(report)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{_head(report, list(parts))}{join(parts.values())}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _head(report: Report, parts: list[str]) -> Markup:
    """Title, links to the parts, the figures one looks for first, where everything came from."""
    nav = "".join(f'<a href="#{part.split()[-1].lower()}">{part}</a>' for part in parts)
    return Markup(
        f"<h1>{text(Path(report.source).name)}</h1>\n<nav>{nav}</nav>\n{_tiles(report)}{_facts(report)}{_outputs(report)}"
    )


def _tiles(report: Report) -> Markup:
    sizes = [megabytes(report.source_bytes), megabytes(report.compiled_bytes)]
    tiles = [
        (f"{report.kinds} weights quantized", percent(report.coverage)),
        ("size", Markup(" → ".join(size.replace(" ", "&nbsp;") for size in sizes))),
        ("bits per quantized weight", number(report.bits_per_weight)),
        *_errors(report),
    ]
    return Markup(f'<div class="tiles">{join(_tile(*tile) for tile in tiles)}</div>\n')


def _tile(told: str, value: str) -> Markup:
    return Markup(f"<div><span>{text(told, 120)}</span><b>{text(value)}</b></div>")


def _errors(report: Report) -> list[tuple[str, str]]:
    """The error of the first output, which is the logits where there are any, and of the nodes."""
    on = f" on {report.measured}" if report.measured else ""
    tiles = [(f"error of {output.name}{on}", output.told) for output in report.outputs[:1]]
    if (found := report.predictions) is not None:
        ends = f"{number(found.before)} → {number(found.after)}"
        tiles += [(f"KL, nats a token{on}", found.told_kl), (f"perplexity, {found.tokens} tokens", ends)]
    if report.speed is not None:
        word = "time of the float model: slower" if report.speed.slower else "time of the float model"
        tiles.append((word, f"{report.speed.ratio:.2f} ×"))
    errors = sorted((node.error for node in report.nodes), key=lambda error: (math.isnan(error), error))
    if errors:
        middle = errors[len(errors) // 2]
        tiles.append(("node errors: median, worst", f"{number(middle)}, {number(errors[-1])}"))
    return tiles


def _facts(report: Report) -> Markup:
    recipe = _settings(report)
    facts = {
        "model": report.source,
        "hash": report.source_hash,
        "output": ", ".join(report.files),
        "passes": " → ".join(map(str, report.recipe.get("passes", []))),
        "recipe": ", ".join([*(f"{key} {_setting(value)}" for key, value in recipe.items()), "else the defaults"])
        if recipe
        else "the defaults",
        "calibration": report.data,
        "warnings": "; ".join(report.warnings),
        "accuracy on": report.measured,
        "speed": report.speed.told() if report.speed is not None else "",
        "rows": str(report.rows or ""),
        "trial": "; ".join(report.trials),
        "caches": report.caches,
        "target": "; ".join(report.target),
        "took": report.took,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    lines = (Markup(f"<dt>{name}</dt><dd>{text(value, 1000)}</dd>") for name, value in facts.items() if value)
    return Markup(f'<dl class="facts">{join(lines)}</dl>\n')


def _settings(report: Report) -> dict[str, object]:
    """Those settings of the recipe that decided something: of the weights' form where weights were packed, and what
    differs from the defaults.
    """
    form = {"bits", "group_size", "symmetric", "target", "lm_head", "embedding"} if packs(report) else set()
    rest = {key: value for key, value in report.recipe.items() if key in SETTINGS and key != "passes"}
    return {k: v for k, v in rest.items() if k in form or v != SETTINGS[k].plain(SETTINGS[k].default)}


def _setting(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _outputs(report: Report) -> Markup:
    """Every output of the compiled model against the float one, and whether the file reproduces that."""
    if not report.outputs:
        return Markup()
    rows = [[output.name, output.told, f"{output.cosine:.5f}"] for output in report.outputs]
    made = table(
        f"Outputs against the float model, on {report.measured or 'the check batches'}",
        ["Output", "Relative error", "Cosine"],
        rows,
        numbers=2,
    )
    if report.predictions is not None:
        told = report.predictions.told()
        made = join([made, Markup(f"<p>{text(told[0].upper() + told[1:], 400)}.</p>\n")])
    if report.verified:
        made = join([made, Markup(f"<p>Verified: {text(report.verified, 400)}.</p>\n")])
    if report.reload_error is None:
        return made
    close = f"to {report.reload_error:.1e}" if report.reload_error else "exactly"
    told = f"The saved file reproduces the verified outputs {close}."
    return join([made, Markup(f"<p>{told}</p>\n")])
