"""`qcompile timings`: how long a model's products take here, in each format that they may get."""

from qcompile.compiler.api.timing import time_products
from qcompile.compiler.commands.declared.timings import Options
from qcompile.compiler.commands.options import Document, recipe_of
from qcompile.compiler.console.terminal import Bar, console
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import check_model_file, check_result_path
from qcompile.compiler.files.publish import write_text


def run(args: Options) -> Document:
    """Measure, print, and write the table."""
    model = model_file(args.model)
    check_model_file(model)
    if args.output is not None:
        check_result_path([model], args.output, [])
    with Bar() as bar:
        found = time_products(model, recipe_of(args), progress=bar)
    if args.output is not None:
        write_text(args.output, found.to_json())
    screen = console(answer=True)
    found.sheet().show(screen)
    if args.output is not None:
        screen.print(f"wrote     {args.output}", soft_wrap=True)
    return found.to_dict()
