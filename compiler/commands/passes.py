"""`qcompile passes`: what can stand in a pass list."""

import argparse
from typing import Any

from rich.console import Console

from qcompile.compiler.plan import PASSES, describe, parameters, summary
from qcompile.passes.base import needs_calibration


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("passes", help="list the passes", description="The passes and their parameters.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each pass, in the order in which a full list runs them."""
    console = Console(highlight=False)
    for name, kind in PASSES.items():
        data = " [dim](needs calibration)[/dim]" if needs_calibration(kind) else ""
        console.print(f"[bold]{name:<8}[/bold] {summary(kind)}{data}", soft_wrap=True)
        known = describe(parameters(kind))
        if known:
            console.print(f"         {known}", soft_wrap=True, markup=False)
    console.print('\nexample  --passes "smooth(alpha=0.5),awq,gptq,pack"', markup=False)
    return 0
