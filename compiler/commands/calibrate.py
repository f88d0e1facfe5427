"""`qcompile calibrate`: ranges of activations once, for many compiles."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from qcompile.compiler.api.calibrate import DEFAULT_PASSES, Calibrated, Seen, calibrate_model, with_observer
from qcompile.compiler.commands import compile as compiling
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.calibrate import Options
from qcompile.compiler.commands.options import (
    Document,
    changed,
    recipe_of,
)
from qcompile.compiler.console.numbers import megabytes
from qcompile.compiler.console.terminal import Bar, console, table
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import check_model_file

_SHOWN = 8


def run(args: Options) -> Document:
    """Calibrate, and print what stands out."""
    args = changed(args, model=model_file(args.model))
    if args.passes is None and args.recipe is None:
        args = changed(args, passes=",".join(map(str, DEFAULT_PASSES)))
    recipe = recipe_of(args)
    idle.of(args, recipe)
    if args.observer is not None:
        recipe = with_observer(recipe, args.observer)
    check_model_file(args.model)
    output = args.output or args.model.with_suffix(".statistics")
    screen = console()
    with Bar() as bar:
        calibration = compiling.calibration_of(args)
        made = calibrate_model(args.model, recipe, output=output, calibration=calibration, progress=bar)
    print_calibrated(made, screen)
    screen.print(f"wrote     {output} ({megabytes(made.size)})", soft_wrap=True)
    return {"output": str(output), "bytes": made.size, "data": made.data, "activations": list(map(asdict, made.seen))}


def print_calibrated(made: Calibrated, screen: Console) -> None:
    """The activations of the widest ranges, whose steps are the coarsest, and those that ranges cut most."""
    screen.print(f"data      {made.data}")
    screen.print(f"widest ranges of {len(made.seen)} activations")
    _print(sorted(made.seen, key=lambda seen: -seen.width)[:_SHOWN], screen)
    cut = sorted((seen for seen in made.seen if seen.clipped), key=lambda seen: -(seen.clipped or 0))
    screen.print(f"most clipped of {len(cut)} activations with numbers outside of their range")
    if cut:
        _print(cut[:_SHOWN], screen)


def _print(rows: Sequence[Seen], screen: Console) -> None:
    made = table("activation", "seen from", "to", "range from", "to", "clipped", numbers=5)
    for seen in rows:
        ends = (f"{end:.4g}" for end in (seen.observed_low, seen.observed_high, seen.low, seen.high))
        made.add_row(seen.value, *ends, "" if seen.clipped is None else f"{1e6 * seen.clipped:.1f} ppm")
    screen.print(made)
