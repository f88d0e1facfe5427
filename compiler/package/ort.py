"""The folder for ONNX Runtime itself: a model in one file where it is small, and the native kernels it has use for."""

from pathlib import Path

from qcompile.compiler.files.load import check_model_file, load_model
from qcompile.compiler.package.beside import LICENCES, licence_files
from qcompile.compiler.package.folder import MODEL, Contents, Packaged, licences, native_library, write_folder

# ONNX Runtime keeps weights that lie in the model file itself beside those it packs for its kernels.
_SMALL = 64 << 20
_README = "README.md"


def package_ort(
    source: Path | str, folder: Path | str, *, tokenizer: Path | None = None, kernels: str = "auto"
) -> Packaged:
    """--for ort: write any model into `folder`, its weights inside the file where they are small, and its kernels.

    Of a tokenizer nothing is asked, and none is copied. Otherwise as `genai.package`.
    """
    source, target = Path(source), Path(folder).absolute() / MODEL
    check_model_file(source)
    model = load_model(source)
    library, lacking = native_library(model, source, kernels)
    found = licence_files(source.parent)
    there = target.parent.is_dir() and target.parent.samefile(source.parent)
    copied = ([] if there else found) + ([library] if library else [])
    texts = {_README: _readme(library), LICENCES: licences(found, library)}
    return write_folder(model, source, target, Contents(tuple(copied), texts, lacking), within=_SMALL)


def _readme(library: Path | None) -> str:
    """How a program opens it."""
    opened = f'running = onnxruntime.InferenceSession("{MODEL}", options)'
    if library is None:
        return f"# {MODEL}\n\nIn Python: `{opened.replace(', options', '')}`. Data files beside it keep their names.\n"
    return f"""# {MODEL}

In Python: `options = onnxruntime.SessionOptions(); options.register_custom_ops_library("./{library.name}")`,
then `{opened}`. In C: `RegisterCustomOpsLibrary_V2(options, "./{library.name}")`.
Without the library the file runs as well, slower. Data files beside it keep their names.
"""
