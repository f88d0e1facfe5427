"""Options of `qcompile MODEL.onnx …`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from qcompile.compiler.commands.options import (
    Calibrating,
    Clustered,
    Common,
    Recipes,
    command,
    option,
    positional,
)
from qcompile.compiler.recipe import DATA, MIXED, SAFETY, WHAT, WHICH

_OUTPUT = (
    "the compiled model, or a folder for it, its tokenizer and configuration (default: MODEL-int4.onnx, or FOLDER-int4)"
)


@command(WHAT, WHICH, DATA, MIXED, SAFETY)
class Options(Common, Clustered, Calibrating, Recipes):
    """Quantize the weights of an ONNX model. The result is one ONNX file (and its data file) that any ONNX Runtime
    application can load. Without --passes the best known list runs: smooth,awq,rotate,gptq,pack. `--passes pack` alone
    is plain rounding to nearest and needs no data. Parameters go in parentheses:
    "smooth(alpha=0.5),awq,pack(clip=false)"; `qcompile passes` lists them."""

    model: Annotated[
        Path,
        positional(
            "MODEL", "the float model: an .onnx file, a folder with one, or a Hugging Face folder (exported first)"
        ),
    ]
    output: Annotated[
        str | None,
        option(
            _OUTPUT,
            "FILE",
            alias="-o",
        ),
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
    budget_file: Annotated[
        Path | None,
        option(
            "compile a point of the frontier that an earlier --budget, --max-kl or --min-sqnr drew for this model and "
            "target, with the settings of that compile: its report.json",
            "FILE",
            under=MIXED,
        ),
    ] = None
    point: Annotated[int | None, option("which point, as the report numbers them", "N", under=MIXED)] = None
    for_machine: Annotated[
        Path | None,
        option(
            "times of products that `qcompile timings` measured on another machine, for --fastest and for what the "
            "frontier says of speed",
            "FILE",
            under=MIXED,
        ),
    ] = None
    statistics: Annotated[
        Path | None,
        option("ranges of activations from `qcompile calibrate` instead of a calibration run", "FILE", under=DATA),
    ] = None
    eval_data: Annotated[
        list[str],
        option(
            "text, array or image files that the accuracy in the report is measured on; none of them may be calibrated "
            "on (default: a part of the calibration data that is left out; of fewer than 36 rows, these themselves)",
            "FILE…",
            under=DATA,
            many=True,
        ),
    ] = field(default_factory=list)
    labels: Annotated[Path | None, option("class numbers of the rows of --eval-data", "FILE", under=SAFETY)] = None
    metric: Annotated[
        str | None, option("a score of your own on --eval-data, see `qcompile eval --help`", "module:function",
                           under=SAFETY)
    ] = None  # fmt: skip
    max_drop: Annotated[
        str | None,
        option(
            "exit with 1 where the score on --eval-data (of --metric, else accuracy by --labels, else top-1 agreement) "
            "loses more: 0.5% of the float model's, or 0.005",
            "DROP",
            under=SAFETY,
        ),
    ] = None
    bench: Annotated[
        bool, option("run both models in turns for a few seconds, and say if the compiled one is slower", under=SAFETY)
    ] = False
    verify: Annotated[
        Literal["auto", "full", "sample", "none"],
        option(
            "compare every packed product with its weights and run the saved file; or an eighth of the columns; or "
            "nothing but bytes (default: full; sample of more than 2 GB where nothing is calibrated)",
            "{auto,full,sample,none}",
            under=SAFETY,
        ),
    ] = "auto"
    fresh: Annotated[
        bool,
        option("start over, where the same command was interrupted and would go on behind its last checkpoint",
               under=SAFETY),
    ] = False  # fmt: skip
    checkpoints: Annotated[
        Path | None,
        option(
            "keep the finished segments in this folder, as large as the output and more, and begin behind them where "
            "only what follows is new: --attention, --caches, fuse, how many nodes stay in float",
            "DIR",
            under=SAFETY,
        ),
    ] = None
    dry_run: Annotated[
        bool, option("print the plan: nodes, sizes, memory, with --budget the frontier; write nothing", under=SAFETY)
    ] = False
