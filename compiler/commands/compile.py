"""`qcompile MODEL.onnx …`: the main job."""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qcompile.compiler.commands.dry_run import print_plan
from qcompile.compiler.commands.options import add_custom_ops, add_recipe, add_settings, recipe_of
from qcompile.compiler.commands.package import tell
from qcompile.compiler.console.terminal import console as stdout
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.data.images import Pictures
from qcompile.compiler.files.load import check_model_file, check_output_path, check_result_path
from qcompile.compiler.files.publish import replace_file, staging, writing
from qcompile.compiler.package.folder import MODEL
from qcompile.compiler.package.genai import check_package, package
from qcompile.compiler.pipeline import compile_model, default_output, page_path, report_path
from qcompile.compiler.plan import for_application
from qcompile.compiler.recipe import DATA, MIXED, SAFETY, WHAT, WHICH, Recipe, save_recipe
from qcompile.compiler.report.terminal import print_report
from qcompile.passes.errors import UserError

_DESCRIPTION = """\
Quantize the weights of an ONNX model. The result is one ONNX file (and its data file) that any ONNX Runtime
application can load. Without --passes the best known list runs: smooth,awq,gptq,pack. `--passes pack` alone is
plain rounding to nearest and needs no data. Parameters go in parentheses: "smooth(alpha=0.5),awq,pack(clip=false)";
`qcompile passes` lists them."""


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "compile",
        help="quantize a model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="the float model")
    told = "the compiled model, or a folder for it (default: MODEL-int4.onnx beside it)"
    parser.add_argument("-o", "--output", help=told)
    group = parser.add_argument_group("what to do")
    add_settings(group, WHAT, WHICH)
    add_recipe(group.add_argument)
    told = "make -o the folder that an application copies, as qcompile package does (docs/genai.md)"
    group.add_argument("--for", dest="kind", choices=("genai",), help=told)
    group.add_argument("--save-recipe", type=Path, metavar="FILE", help="write the settings used to a YAML file")
    add = add_calibration(parser)
    add("--statistics", type=Path, metavar="FILE",
        help="ranges of activations from `qcompile calibrate` instead of a calibration run")  # fmt: skip
    add_settings(parser.add_argument_group(f"{MIXED}, behind qdq or dynamic"), MIXED)
    group = parser.add_argument_group(SAFETY)
    add_settings(group, SAFETY)
    told = "print the plan: nodes, sizes before and after, memory; write nothing"
    group.add_argument("--dry-run", action="store_true", help=told)
    parser.set_defaults(run=run)


def add_calibration(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Add the options of calibration data; returns what adds more to their group."""
    group = parser.add_argument_group(DATA)
    add: Callable[..., Any] = group.add_argument
    sources = (
        "text, .jsonl, .npz, .npy or image files, folders of them, or module:name (a function that gives dicts of "
        "arrays, or a reader with get_next); or one word: self (tokens that the model generates), norms (no data: the "
        "scales of norms stand in for activations). Default: bundled text, else self"
    )
    add("--calibration", nargs="+", action="extend", default=[], metavar="FILE", help=sources)
    add("--image-mean", type=_numbers, metavar="R,G,B", help="of images: (pixel/255 - mean) / std; one number, or one "
        "a channel (default: of preprocessor_config.json beside the model, else ImageNet's)")  # fmt: skip
    add("--image-std", type=_numbers, metavar="R,G,B", help="deviations, likewise")
    add("--image-size", type=_image_size, metavar="H,W", help="of images, where the model's input leaves it free")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json (default: beside the model)")
    add_settings(group, DATA)
    add_custom_ops(add)
    return add


def calibration_of(args: argparse.Namespace) -> Calibration:
    """What the options of `add_calibration` say."""
    pictures = Pictures(args.image_mean, args.image_std, args.image_size)
    return Calibration(args.calibration, args.tokenizer, pictures=pictures)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5 or 0.4,0.5,0.6, got {text!r}") from error


def _image_size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected height,width such as 224,224, got {text!r}") from error
    return height, width


def run(args: argparse.Namespace) -> int:
    """Compile, or with --dry-run say what would happen."""
    recipe = recipe_of(args)
    check_model_file(args.model)
    output = Path(args.output) if args.output else default_output(args.model, recipe)
    if args.kind is not None:
        recipe, output = _for_application(args, recipe)
    elif output.is_dir() or (args.output or "").endswith(("/", os.sep)):
        output = output / args.model.name
    screen = stdout()
    check_output_path(args.model, output, [args.recipe] if args.recipe is not None else [])
    if args.save_recipe is not None:
        _check_recipe_path(args, output)
    calibration = calibration_of(args)
    if args.dry_run:
        print_plan(args.model, output, recipe, calibration, screen)
        return 0
    with ExitStack() as stack:
        staged = stack.enter_context(staging(args.save_recipe)) if args.save_recipe is not None else None
        if staged is not None:  # written before the work, which a full disk or a missing permission must not lose
            with writing(args.save_recipe):
                save_recipe(recipe, staged)
        with Bar(screen) as bar:
            report = compile_model(
                args.model, recipe, output=output, calibration=calibration, progress=bar, statistics=args.statistics
            )
        if staged is not None:
            replace_file(staged, args.save_recipe)
    print_report(report, screen)
    for file in report.files:
        screen.print(f"wrote     {output.with_name(file)}", soft_wrap=True)
    if args.kind is not None:
        tell(package(output, output.parent, tokenizer=args.tokenizer or args.model), output.parent, args.kind)
    return 0


def _for_application(args: argparse.Namespace, recipe: Recipe) -> tuple[Recipe, Path]:
    """(the recipe, the model file) of --for; what its folder cannot hold is said before the work."""
    if not args.output:
        raise UserError(f"--for {args.kind} writes a folder: name it with -o DIR")
    folder = Path(args.output)
    check_package(args.model, folder, args.tokenizer)
    return for_application(recipe, args.kind), folder / MODEL


def _check_recipe_path(args: argparse.Namespace, output: Path) -> None:
    path, model, written = args.save_recipe, args.model, [output, report_path(output), page_path(output)]
    if path.resolve() in [file.resolve() for file in (model, *written)]:
        raise UserError(f"--save-recipe {path} would overwrite a model or its report; choose another name")
    read = [*named(args.calibration), *(file for file in (args.recipe, args.statistics) if file is not None)]
    check_result_path([model], path, read)


class Bar:
    """A progress bar with the time left; plain lines now and then where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console, self.started, self.printed = console, time.monotonic(), 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> "Bar":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def step(self, name: str) -> None:
        """A new step of the job."""
        self.bar.update(self.task, description=name)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed > 15 or " of " not in name):
            self.printed = now
            self.console.print(f"{now - self.started:5.0f} s  {name}", highlight=False)

    def total(self, rows: int) -> None:
        """Tokens that the segments will see."""
        self.bar.update(self.task, total=max(rows, 1))

    def advance(self, rows: int) -> None:
        """Tokens done."""
        self.bar.update(self.task, advance=rows)
