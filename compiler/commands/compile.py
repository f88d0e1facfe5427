"""`qcompile MODEL.onnx …`: the main job."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

from qcompile.compiler.commands.dry_run import print_plan
from qcompile.compiler.commands.options import (
    Calibrating,
    Common,
    Document,
    Recipes,
    command,
    option,
    positional,
    recipe_of,
)
from qcompile.compiler.commands.package import tell
from qcompile.compiler.console.terminal import Bar, console
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


@command(WHAT, WHICH, DATA, MIXED, SAFETY)
class Options(Common, Calibrating, Recipes):
    """Quantize the weights of an ONNX model. The result is one ONNX file (and its data file) that any ONNX Runtime
    application can load. Without --passes the best known list runs: smooth,awq,gptq,pack. `--passes pack` alone is
    plain rounding to nearest and needs no data. Parameters go in parentheses:
    "smooth(alpha=0.5),awq,pack(clip=false)"; `qcompile passes` lists them."""

    model: Annotated[Path, positional("MODEL.onnx", "the float model")]
    output: Annotated[
        str | None,
        option("the compiled model, or a folder for it (default: MODEL-int4.onnx beside it)", "FILE", alias="-o"),
    ] = None
    kind: Annotated[
        Literal["genai"] | None,
        option(
            "make -o the folder that an application copies, as qcompile package does (docs/genai.md)",
            "{genai}",
            name="--for",
            under=WHAT,
        ),
    ] = None
    save_recipe: Annotated[Path | None, option("write the settings used to a YAML file", "FILE", under=WHAT)] = None
    statistics: Annotated[
        Path | None,
        option("ranges of activations from `qcompile calibrate` instead of a calibration run", "FILE", under=DATA),
    ] = None
    dry_run: Annotated[
        bool, option("print the plan: nodes, sizes before and after, memory; write nothing", under=SAFETY)
    ] = False


def calibration_of(args: Calibrating) -> Calibration:
    """What the options of `Calibrating` say."""
    pictures = Pictures(args.image_mean, args.image_std, args.image_size)
    return Calibration(args.calibration, args.tokenizer, pictures=pictures)


def run(args: Options) -> Document:
    """Compile, or with --dry-run say what would happen."""
    recipe = recipe_of(args)
    check_model_file(args.model)
    output = Path(args.output) if args.output else default_output(args.model, recipe)
    if args.kind is not None:
        recipe, output = _for_application(args, args.kind, recipe)
    elif output.is_dir() or (args.output or "").endswith(("/", os.sep)):
        output = output / args.model.name
    screen = console()
    check_output_path(args.model, output, [args.recipe] if args.recipe is not None else [])
    if args.save_recipe is not None:
        _check_recipe_path(args, args.save_recipe, output)
    calibration = calibration_of(args)
    if args.dry_run:
        return print_plan(args.model, output, recipe, console(answer=True))
    with ExitStack() as stack:
        saved = args.save_recipe
        staged = None if saved is None else stack.enter_context(staging(saved))
        if (
            saved is not None and staged is not None
        ):  # written before the work, which a full disk or a missing permission must not lose
            with writing(saved):
                save_recipe(recipe, staged)
        with Bar() as bar:
            report = compile_model(
                args.model, recipe, output=output, calibration=calibration, progress=bar, statistics=args.statistics
            )
        if saved is not None and staged is not None:
            replace_file(staged, saved)
    print_report(report, screen)
    for file in report.files:
        screen.print(f"wrote     {output.with_name(file)}", soft_wrap=True)
    if args.kind is not None:
        tell(package(output, output.parent, tokenizer=args.tokenizer or args.model), output.parent, args.kind)
    return report.to_dict()


def _for_application(args: Options, kind: str, recipe: Recipe) -> tuple[Recipe, Path]:
    """(the recipe, the model file) of --for; what its folder cannot hold is said before the work."""
    if not args.output:
        raise UserError(f"--for {kind} writes a folder: name it with -o DIR")
    folder = Path(args.output)
    check_package(args.model, folder, args.tokenizer)
    return for_application(recipe, kind), folder / MODEL


def _check_recipe_path(args: Options, path: Path, output: Path) -> None:
    model, written = args.model, [output, report_path(output), page_path(output)]
    if path.resolve() in [file.resolve() for file in (model, *written)]:
        raise UserError(f"--save-recipe {path} would overwrite a model or its report; choose another name")
    read = [*named(args.calibration), *(file for file in (args.recipe, args.statistics) if file is not None)]
    check_result_path([model], path, read)
