"""The commands of `qcompile`: their modules, imported only when chosen, their options without what runs them."""

import importlib
from typing import Any

from qcompile.passes.errors import UserError
from qcompile.passes.interrupts import uninterrupted

# By name: the module, and what it is for, in a few words.
COMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("qcompile.compiler.commands.compile", "quantize a model (the default: qcompile MODEL.onnx …)"),
    "calibrate": ("qcompile.compiler.commands.calibrate", "save statistics of activations, for --statistics"),
    "passes": ("qcompile.compiler.commands.passes", "list the passes, observers and weight formats"),
    "export": ("qcompile.compiler.commands.export", "export a Hugging Face or GGUF model to ONNX"),
    "eval": ("qcompile.compiler.commands.eval", "perplexity, KL divergence and agreement with a reference"),
    "sweep": ("qcompile.compiler.commands.sweep", "many settings: accuracy against bits per weight"),
    "sensitivity": ("qcompile.compiler.commands.sensitivity", "which integer nodes change the output most"),
    "inspect": (
        "qcompile.compiler.commands.inspect",
        "what is in a model: types, sizes, what is quantized and why not",
    ),
    "explain": ("qcompile.compiler.commands.explain", "why a node got what it got: decisions, candidates, errors"),
    "diff": ("qcompile.compiler.commands.diff", "what differs between two models: formats, bytes, errors, recipes"),
    "generate": ("qcompile.compiler.commands.generate", "text from a decoder"),
    "package": (
        "qcompile.compiler.commands.package",
        "the folder that an application copies (onnxruntime-genai, transformers.js, ORT)",
    ),
    "bench": ("qcompile.compiler.commands.bench", "speed and memory of models, against each other"),
    "timings": ("qcompile.compiler.commands.timings", "how long a model's products take here, for --for-machine"),
    "recipe": ("qcompile.compiler.commands.recipe", "check a recipe file; its JSON schema for editors"),
    "completion": ("qcompile.compiler.commands.completion", "what a shell needs to complete all this"),
}


def declared(name: str) -> Any:
    """The `Options` of a command, whose help answers at once: nothing that runs it is imported."""
    home, _, module = COMMANDS[name][0].rpartition(".")
    return _imported(name, f"{home}.declared.{module}").Options


def load(name: str) -> Any:
    """The module of a command, with its `Options` and `run`; UserError where it is not there."""
    return _imported(name, COMMANDS[name][0])


def _imported(name: str, path: str) -> Any:
    try:
        with uninterrupted():
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path:
            raise UserError(f"the command {name!r} is not part of this installation") from error
        raise
