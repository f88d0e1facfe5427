"""`qcompile MODEL.onnx …`: the main job."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompile.compiler.api.evaluation import EvaluationSet, evaluate_models
from qcompile.compiler.api.folders import check_folder, copy_companions, exported, home, within
from qcompile.compiler.api.spending import Spent, asked_for, check_bounds, planned, spending
from qcompile.compiler.commands import idle
from qcompile.compiler.commands.declared.compile import Options
from qcompile.compiler.commands.dry_run import print_plan
from qcompile.compiler.commands.eval import print_outputs
from qcompile.compiler.commands.options import (
    Calibrating,
    Document,
    changed,
    recipe_of,
    settings_of,
)
from qcompile.compiler.commands.package import tell
from qcompile.compiler.console.terminal import Bar, console, remark
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import GENERAL, Files, named
from qcompile.compiler.data.images import Pictures
from qcompile.compiler.files import finished
from qcompile.compiler.files.folders import graphs, is_checkpoint, page_path, report_path
from qcompile.compiler.files.load import check_model_file, check_output_path, check_result_path
from qcompile.compiler.files.publish import replace_file, staging, writing
from qcompile.compiler.measure.bounds import Bounds
from qcompile.compiler.measure.evaluate import OutputScores
from qcompile.compiler.measure.metric import Drop, Metric
from qcompile.compiler.package.folder import MODEL
from qcompile.compiler.package.genai import check_package, package
from qcompile.compiler.pipeline import compile_model, default_output
from qcompile.compiler.plan import for_application
from qcompile.compiler.recipe import Recipe, save_recipe
from qcompile.compiler.report.terminal import print_report
from qcompile.compiler.results.frontier import Frontier
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount
from qcompile.passes.errors import UserError

_MODEL = "the float model: an .onnx file, its folder, or a Hugging Face folder or .gguf file, which is exported first"
# Options that say how a compile is done.
_OF_COMPILES = ("bench", "verify", "fresh", "checkpoints")
# Inode and time of a file, None where there is none.
Stamp = tuple[int, int] | None


def calibration_of(args: Calibrating) -> Calibration:
    """What the options of `Calibrating` say."""
    pictures = Pictures(args.image_mean, args.image_std, args.image_size)
    return Calibration(args.calibration, args.tokenizer, pictures=pictures)


def run(args: Options) -> Document:
    """Compile a model, or all models of a folder; or with --dry-run say what would happen."""
    idle.of(args, _recipe(args), point=args.point is not None)
    if args.dry_run:
        idle.told({name: "--dry-run compiles nothing" for name in _OF_COMPILES if name in args.given})
    if args.checkpoints is not None:
        finished.check(args.checkpoints)
    if not (args.model.is_dir() or is_checkpoint(args.model)):
        with _told_what_is_written() as seen:
            return _one(args, seen, None)
    folder = Path(args.output) if args.output else default_output(args.model, _recipe(args))
    if folder.suffix == ".onnx" or folder.is_file():
        raise UserError(f"{args.model} makes a folder, with its tokenizer and configuration: name one with -o DIR")
    if args.dry_run and is_checkpoint(args.model):
        remark(f"the plan is of the graph: {args.model} is exported first, and kept for the compile")
    with Bar() as bar:
        source = exported(args.model, bar.step)
    if args.kind is None:
        check_folder(source, folder)
    _check_one(_recipe(args), graphs(source), args.budget_file)
    check_bounds(graphs(source), _recipe(args))
    with _told_what_is_written() as seen:
        each = [changed(args, model=graph, output=f"{folder}{os.sep}") for graph in graphs(source)]
        made = [_one(own, seen, (args.model, folder)) for own in each]
    return made[0] if len(made) == 1 else made


def _check_one(recipe: Recipe, models: Sequence[Path], points: Path | None) -> None:
    """UserError for a budget of bytes that several models would have to share, and for the points of one of them."""
    if points is not None and len(models) > 1:
        told = f"--budget-file {points} is of one model, and here are {', '.join(path.name for path in models)}"
        raise UserError(f"{told}: compile that one alone")
    if recipe.budget is not None and Amount.parse(recipe.budget).size is not None and len(models) > 1:
        told = f"a budget in bytes is for one model, and here are {', '.join(path.name for path in models)}"
        raise UserError(f"{told}: give bits a weight, --budget 4bpw, or compile them one by one")


@contextmanager
def _told_what_is_written() -> Iterator[dict[Path, Stamp]]:
    """Have an interrupt say which models are written by then. Yields what takes the outputs, each before its compile,
    by their stamps: one that has another stamp at the interrupt has been published."""
    seen: dict[Path, Stamp] = {}
    try:
        yield seen
    except KeyboardInterrupt as stopped:
        written = [str(output) for output, before in seen.items() if _stamp(output) != before]
        if not written or stopped.args:
            raise
        told = f"{', '.join(written)} {'is' if len(written) == 1 else 'are'} written"
        stopped.args = (f"{told}, and what was to come behind that is not",)
        raise


def _stamp(path: Path) -> Stamp:
    """Other numbers after a file was replaced; None without one."""
    try:
        told = path.stat()
    except OSError:
        return None
    return told.st_ino, told.st_mtime_ns


def _one(args: Options, seen: dict[Path, Stamp], asked: tuple[Path, Path] | None) -> dict[str, Any]:
    """Compile one model file; `seen` takes its output, as it is before. asked: its folder, and where it goes."""
    _check_scores(args)
    recipe = _recipe(args)
    check_model_file(args.model)
    output = Path(args.output) if args.output else default_output(args.model, recipe)
    inside = args.kind is None and args.output is not None and within(args.output)
    if args.kind is not None:
        recipe, output = _for_application(args, args.kind, recipe)
    elif inside:
        output = output / args.model.name
    check_output_path(args.model, output, [args.recipe] if args.recipe is not None else [])
    if args.save_recipe is not None:
        _check_recipe_path(args, args.save_recipe, output)
    if args.dry_run:
        with Bar() as bar:
            made, frontier = planned(
                args.model,
                recipe,
                calibration_of(args),
                bar,
                evaluation=_evaluation(args),
                point=_point(args)[1],
                machine=args.for_machine,
            )
        return print_plan(args.model, output, made, console(answer=True), frontier)
    seen[output] = _stamp(output)
    report = _compiled(args, recipe, output, asked)
    screen = console()
    print_report(report, screen)
    beside, others = copy_companions(home(args.model), output.parent) if inside else ([], [])
    if others:
        names = ", ".join(path.name for path in others)
        told = f"kept      {names} in {output.parent}, which are not this model's: nothing was copied beside it"
        screen.print(told, soft_wrap=True)
    for file in (*map(output.with_name, report.files), *beside):
        screen.print(f"wrote     {file}", soft_wrap=True)
    if args.kind is not None:
        tell(package(output, output.parent, tokenizer=args.tokenizer or args.model), output.parent, args.kind)
    _judge(args, output)
    return report.to_dict()


def _compiled(args: Options, recipe: Recipe, output: Path, asked: tuple[Path, Path] | None) -> Report:
    """The compile itself; --save-recipe is written before the work, which a full disk must not lose."""
    with ExitStack() as stack:
        saved = args.save_recipe
        staged = None if saved is None else stack.enter_context(staging(saved))
        if saved is not None and staged is not None:
            with writing(saved):
                save_recipe(recipe, staged)
        with Bar() as bar:

            def run(made: Spent) -> Report:
                return compile_model(
                    args.model,
                    made.recipe,
                    chosen=made.chosen,
                    output=output,
                    calibration=made.calibration,
                    progress=bar,
                    statistics=args.statistics,
                    evaluation=made.evaluation,
                    bench=args.bench,
                    verify=args.verify,
                    fresh=args.fresh,
                    checkpoints=args.checkpoints,
                    asked=asked,
                )

            data, judged = calibration_of(args), _evaluation(args)
            report = spending(
                args.model, recipe, data, bar, run, evaluation=judged, point=_point(args)[1], machine=args.for_machine
            )
        if saved is not None and staged is not None:
            replace_file(staged, saved)
    return report


def _point(args: Options) -> tuple[Recipe, Frontier | None]:
    """The recipe of the options, or of a point of --budget-file, and the frontier of that."""
    return asked_for(args.budget_file, args.point, settings_of(args), args.recipe, lambda: recipe_of(args))


def _recipe(args: Options) -> Recipe:
    return _point(args)[0]


def _evaluation(args: Options) -> Calibration | None:
    """What the accuracy is told on; None for the default."""
    return replace(calibration_of(args), files=args.eval_data, general=False) if args.eval_data else None


def _judge(args: Options, output: Path) -> None:
    """Print the scores of --metric and --labels; Verdict where they lose more than --max-drop. The files stay."""
    data = _evaluation(args)
    if data is None or (args.metric is None and args.labels is None and args.max_drop is None):
        return
    on = EvaluationSet(data=data, labels=args.labels, metric=args.metric)
    scores = [own.scores for own in evaluate_models([output], on, against=args.model).rows]
    print_outputs([own for own in scores if isinstance(own, OutputScores)])
    drop = Drop(args.max_drop) if args.max_drop is not None else None
    lower = args.metric is not None and Metric(args.metric).lower_is_better
    Bounds(max_drop=drop, lower_is_better=lower).check(scores)


def _check_scores(args: Options) -> None:
    """What is wrong with the options of scores is said before the work."""
    if not args.eval_data and (args.metric or args.labels or args.max_drop):
        raise UserError("--metric, --labels and --max-drop are for --eval-data FILE …, which calibration has not seen")
    given = Calibration(args.eval_data)
    texts = [*([GENERAL] if given.general else []), *Files.of(given.files).texts]
    if (args.metric or args.labels or args.max_drop) and texts:
        told = "--metric, --labels and --max-drop judge outputs on arrays (.npz, .npy) or images"
        raise UserError(
            f"--eval-data {texts[0]} is text: {told}; leave them out, and see qcompile eval --text --max-kl"
        )
    if args.labels:
        EvaluationSet(data=given, labels=args.labels).given_labels()
    if args.metric:
        Metric(args.metric)
    if args.max_drop:
        Drop(args.max_drop)


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
