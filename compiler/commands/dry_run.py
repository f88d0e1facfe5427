"""What a compile would do, without doing it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qcompile.compiler.api.rehearsal import Rehearsal, rehearse
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.report.terminal import print_coverage, print_frontier
from qcompile.compiler.results.frontier import Frontier

# Of a decoder with caches there are dozens of inputs.
_SHOWN = 6


def print_plan(
    path: Path, output: Path, recipe: Recipe, console: Console, frontier: Frontier | None = None
) -> dict[str, Any]:
    """Print the nodes by decision, sizes before and after, and memory that compiling will need; the same by name.

    frontier: where the recipe's formats were chosen on.
    """
    plan = replace(rehearse(path, recipe), frontier=frontier)
    console.print(f"plan      {path} → {output}", soft_wrap=True)
    print_coverage(plan.report, console)
    if frontier is not None:
        print_frontier(frontier, console)
    _print_rest(plan, console)
    return {"output": str(output), **plan.to_dict()}


def _print_rest(plan: Rehearsal, console: Console) -> None:
    report = plan.report
    console.print(f"passes    {', '.join(plan.passes)}", soft_wrap=True)
    more = f", … ({len(plan.inputs)} in all)" if len(plan.inputs) > _SHOWN else ""
    console.print(f"segments  {plan.segments}; inputs: {', '.join(plan.inputs[:_SHOWN])}{more}", soft_wrap=True)
    console.print(f"size      {report.source_bytes / 1e6:.1f} MB → about {report.compiled_bytes / 1e6:.1f} MB")
    console.print(f"memory    about {plan.memory / 1e9:.2g} GB; disk about {plan.disk / 1e9:.2g} GB")
    for told in plan.open:
        console.print(f"open      {told}: only data tells", soft_wrap=True)
    if plan.refusal:
        console.print(f"refused   {plan.refusal}", soft_wrap=True, markup=False)
