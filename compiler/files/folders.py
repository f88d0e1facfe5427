"""Folders that stand for models: one with a graph in it, or a Hugging Face folder; and reports beside models."""

from pathlib import Path

from qcompile.passes.errors import UserError

# Places of a folder's graph, the likeliest first; transformers.js and optimum have them in `onnx`.
_NAMES = ("model.onnx", "onnx/model.onnx")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def graphs(folder: Path) -> list[Path]:
    """The graphs of a folder: model.onnx alone where it is there, else all of its .onnx files, by name."""
    known = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    found = sorted(path for path in folder.glob("*.onnx") if path.is_file())
    return [known] if known is not None else found or sorted(folder.glob("onnx/*.onnx"))


def is_checkpoint(path: Path) -> bool:
    """Whether it is a Hugging Face folder without a graph, or a GGUF file: something to export."""
    if path.is_dir():
        weights = any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
        return weights and (path / "config.json").is_file() and not graphs(path)
    return path.suffix.lower() == ".gguf" and path.is_file()


def model_file(path: Path) -> Path:
    """The model that a path stands for: the file itself, or a folder's only graph; UserError where there are more."""
    if not path.is_dir():
        return path
    found = graphs(path)
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} models ({', '.join(own.name for own in found)}): give one of them")
    if found:
        return found[0]
    if is_checkpoint(path):
        raise UserError(f"{path} is a Hugging Face folder without a graph: `qcompile {path}` exports and compiles it")
    raise UserError(f"{path}: no .onnx model in this folder")


def report_path(output: Path) -> Path:
    """Where the report of a compiled model lies."""
    return output.with_name(f"{output.stem}.report.json")


def page_path(output: Path) -> Path:
    """Where the report lies as a page for people."""
    return output.with_name(f"{output.stem}.report.html")
