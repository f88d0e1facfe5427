"""What was done: coverage, sizes, errors; as JSON and as a table on the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from qcompile.compiler.console.numbers import percent
from qcompile.compiler.console.terminal import table
from qcompile.compiler.report.advice import hurting, remedies
from qcompile.compiler.report.nodes import node_rows
from qcompile.compiler.report.tied import Tied
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.phases import longest
from qcompile.compiler.results.report import Report

# Nodes that are named on the terminal.
_WORST = 3
# Commands that are shown there.
_TRIED = 2


def print_report(report: Report, console: Console) -> None:
    """The coverage table, the errors worth knowing, the sizes."""
    if report.quantizer is not None:
        print_coverage(report, console)
    _print_passes(report, console)
    for told in (report.mixed, report.ladder):
        for line in told.lines() if told is not None else ():
            console.print(line, soft_wrap=True)
    if report.frontier is not None:
        print_frontier(report.frontier, console)
    _print_errors(report, console)
    _print_advice(report, console)
    saved = f"{_mb(report.source_bytes)} → {_mb(report.compiled_bytes)}"
    bits = f", {report.bits_per_weight:.2f} bits per quantized {report.kinds} weight" if report.bits_per_weight else ""
    console.print(f"size      {saved}{bits}")
    console.print(f"took      {report.took}", soft_wrap=True)
    if report.phases:
        console.print(f"phases    {longest(report.phases)}", soft_wrap=True)


def _print_advice(report: Report, console: Console) -> None:
    """What hurts most, and what to try; the page has all of it."""
    for own in hurting(report)[:_WORST]:
        told = f"{own.node}: relative error {own.error:.3g}, {percent(own.share)} of all squared errors"
        console.print(f"{'hurts' if own.rank == 1 else '':<9} {own.rank}. {told}", soft_wrap=True)
    for number, remedy in enumerate(remedies(report)[:_TRIED]):
        console.print(f"{'try' if not number else '':<9} {remedy.what}:", soft_wrap=True)
        console.print(f"{'':<9}   {remedy.command}", soft_wrap=True)


def print_coverage(report: Report, console: Console) -> None:
    """What became of the weights, nodes that share a decision in one row."""
    console.print(f"coverage  {report.told}")
    made = table("nodes", "operator", "decision", "weights", "MB", numbers=2)
    rows: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    tied = Tied()
    for d in report.quantizing:
        key = (str(d.detail.get("kind", "")), d.group)
        rows[key] += 1
        weights[key] += tied.weights(d)
        size[key] += tied.nbytes(d) or 0
    for key in rows:
        amount = f"{weights[key] / 1e6:.2f} M" if weights[key] >= 10_000 else f"{weights[key] or ''}"
        megabytes = f"{size[key] / 1e6:.1f}" if size[key] else "shared" if key[1].startswith("int") else ""
        made.add_row(str(rows[key]), key[0], key[1], amount, megabytes)
    if rows:
        console.print(made)


def print_frontier(frontier: Frontier, console: Console) -> None:
    """What each size was foretold to change, and what the one that was taken did."""
    console.print(f"frontier  foretold from {frontier.windows}", soft_wrap=True)
    made = table(*frontier.heads, "", numbers=len(frontier.heads))
    for row in frontier.rows():
        made.add_row(*row)
    console.print(made)
    if told := frontier.timed():
        console.print(f"speed     {told}", soft_wrap=True)
    for line in frontier.lines():
        console.print(f"bound     {line}", soft_wrap=True)


def _print_passes(report: Report, console: Console) -> None:
    for name, decisions in report.decisions.items():
        if name in report.quantizers or not decisions:
            continue
        actions = Counter(d.action for d in decisions)
        told = ", ".join(f"{count} {action}" for action, count in actions.items())
        console.print(f"{name:<9} {told}")


def _print_errors(report: Report, console: Console) -> None:
    console.print(f"data      {report.data}")
    for told in report.warnings:
        console.print(f"warning   {told}", soft_wrap=True)
    if report.rows is not None:
        console.print(f"rows      {report.rows}")
    for trial in report.trials:
        console.print(f"trial     {trial}", soft_wrap=True)
    if report.nodes:
        worst = sorted(report.nodes, key=lambda n: -n.error)
        middle = worst[len(worst) // 2]
        console.print(
            f"nodes     relative error: median {middle.error:.3f}, worst {worst[0].error:.3f} ({worst[0].node})"
        )
    _print_activations(report, console)
    _print_slow(report, console)
    for output in report.outputs[:4]:
        console.print(f"output    {output.name}: relative error {output.told}, cosine {output.cosine:.5f}")
    if report.predictions is not None:
        console.print(f"accuracy  {report.predictions.told()}", soft_wrap=True)
    if report.measured:
        console.print(f"          measured on {report.measured}", soft_wrap=True)
    if report.speed is not None:
        console.print(f"speed     {report.speed.told()}", soft_wrap=True)
    if report.caches:
        console.print(f"caches    {report.caches}", soft_wrap=True)
    for line in report.target:
        console.print(f"target    {line}", soft_wrap=True)
    if report.verified:
        console.print(f"verified  {report.verified}", soft_wrap=True)
    if report.reload_error is not None:
        console.print(f"reloaded  the saved file reproduces the verified outputs to {report.reload_error:.1e}")


def _print_activations(report: Report, console: Console) -> None:
    """How many packed products take int8 activations, and what that adds to their error."""
    measured = [node for node in report.nodes if node.int8_error is not None]
    int8 = [node for node in report.nodes if node.activation_bits == 8]
    if not measured and not int8:
        return
    names, left = report.roundings, len(report.nodes) - len(int8)
    console.print(f"activations  {len(int8)} nodes {names[8]}, {left} nodes {names[16]}{_added(report, int8)}")


def _print_slow(report: Report, console: Console) -> None:
    """Products that ONNX Runtime has no float kernel for."""
    slow = [row for row in node_rows(report) if row.kind == "int8" and row.error and row.error.activation_bits == 16]
    if slow and report.recipe.get("target") == "matmulnbits":
        told = "nodes of 8-bit weights at accuracy level 0: ONNX Runtime decodes the whole weight in every run"
        console.print(f"slow      {len(slow)} {told} (--accuracy-level)", soft_wrap=True)


def _added(report: Report, int8: Sequence[NodeError]) -> str:
    """The squared error of int8 activations over that of all weights, and the largest error of one node."""
    errors, whole = [node.int8_error for node in int8], sum(node.error**2 for node in report.nodes)
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return ""
    share = (
        f"{sum(error**2 for error in known) / whole:.2%} of the squared weight error" if whole else "all of the error"
    )
    return f" (int8 adds {share}; at most {max(known):.4f} in a node)"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
